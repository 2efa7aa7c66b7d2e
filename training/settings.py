"""The options of ``manylora train``, from the command line, then one flat YAML file.

Paths are relative to the working directory, wherever the file is.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml  # type: ignore[import-untyped, unused-ignore]
from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from adapters.errors import AdapterNameError
from adapters.registry.names import check_name
from bases.command_line import Given, Options, parse
from bases.errors import ConfigError
from bases.options import BaseOptions, default_data_dir

API_KEY = "MANYLORA_API_KEY"
"""The environment variable of ``--api-key``: a key on a command line can be seen by other users."""
_FILE_ENDINGS = (".yaml", ".yml")


def _one_or_more(value: object) -> object:
    """``"rows.jsonl"`` -> ``("rows.jsonl",)``: in the YAML file one file needs no list."""
    return (value,) if isinstance(value, str) else value


def _joined(value: object) -> object:
    """``["q_proj", "v_proj"]`` -> ``"q_proj,v_proj"``: in the YAML file layers may be a list."""
    return ",".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else value


def expand_home(path: Path) -> Path:
    """Return ``path`` with ``~`` replaced by the home folder. Raises ValueError."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{str(path)!r} names a home folder that is not known") from None


def _key_from_environment() -> SecretStr | None:
    key = os.environ.get(API_KEY)
    return SecretStr(key) if key else None


class TrainSettings(Options):
    """Train a LoRA adapter on DATA, judge it against the base, and publish it to a server.

    DATA are files of examples, or one YAML file of these options; the command line wins over the file.

    Example: manylora train rows.jsonl --name legal --publish http://127.0.0.1:8000
    """

    model_config = SettingsConfigDict(validate_default=True)
    positional = "data"
    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "Adapter": ("data", "name", "out", "publish", "api_key", "alias", "publish_anyway"),
        "Base": ("model", "data_dir", "device", "quantization", "dtype"),
        "Data": (
            "format", "eval_file", "eval_share", "mix_general", "mix_share", "skip_bad", "too_long", "max_length",
            "packing", "chat_template", "seed",
        ),
        "LoRA": ("method", "r", "alpha", "dropout", "targets", "rslora", "dora", "lint"),
        "Optimisation": (
            "learning_rate", "schedule", "warmup_steps", "epochs", "max_steps", "batch_size", "accumulation",
            "weight_decay", "max_grad_norm", "optimizer", "gradient_checkpointing",
        ),
        "Run": ("eval_steps", "early_stopping", "save_steps", "resume", "report_to", "dry_run", "show"),
        "Judging": (
            "min_json_validity", "min_exact_match", "min_stop_share", "max_loss_ratio", "max_divergence", "judge_rows",
            "judge_tokens",
        ),
    }  # fmt: skip
    metavars: ClassVar[Mapping[str, str]] = {
        "data": "DATA",
        "name": "NAME",
        "out": "FOLDER",
        "publish": "URL",
        "api_key": "KEY",
        "alias": "NAME",
        "model": "MODEL",
        "data_dir": "FOLDER",
        "eval_file": "FILE",
        "mix_general": "FILE",
        "chat_template": "FILE",
        "targets": "LAYERS",
        "max_length": "TOKENS",
        "judge_tokens": "TOKENS",
        "max_loss_ratio": "NUMBER|off",
    }

    data: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        min_length=1, description="files of examples (JSONL, JSON, CSV, Parquet), FILE=2.5 for a weight; or config.yaml"
    )
    name: str = Field(description="the adapter's name")
    out: Path | None = Field(None, description="folder for the adapter (unset: trained/NAME under --data-dir)")
    publish: str | None = Field(None, description="running server to upload the adapter to")
    api_key: SecretStr | None = Field(
        default_factory=_key_from_environment,
        description=f"API key of that server (unset: {API_KEY})",
    )
    alias: str | None = Field(None, min_length=1, description="alias on that server to point to the new version")
    publish_anyway: bool = Field(False, description="publish even if the judgement fails")

    model: str = Field("demo", min_length=1, description="demo, a Hugging Face folder, a GGUF file, or a hub id")
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="folder for bases and adapters (unset: MANYLORA_DATA_DIR, or manylora in XDG_DATA_HOME)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    quantization: Literal["nf4", "none"] = Field("nf4", description="of the base's linear layers; nf4 is QLoRA")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="of activations; auto is bf16")

    format: Literal["auto", "alpaca", "sharegpt", "chat", "completion", "text"] = Field(
        "auto", description="format of the examples"
    )
    eval_file: Path | None = Field(None, description="held-out examples (unset: a share of the data)")
    eval_share: float = Field(0.1, ge=0, lt=1, description="share of the data that is held out")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all random choices")
    mix_general: Path | None = Field(None, description="general examples to mix in against forgetting")
    mix_share: float = Field(0.15, gt=0, lt=1, description="share of the training rows that are general")
    skip_bad: bool = Field(False, description="skip rows that cannot be trained on, and count them")
    too_long: Literal["drop", "truncate", "fail"] = Field("drop", description="rows longer than --max-length")
    max_length: int | None = Field(None, ge=2, description="longest row (unset: 1024, or the context if shorter)")
    packing: bool = Field(False, description="pack short rows together to avoid padding")
    chat_template: Path | None = Field(None, description="Jinja file to use instead of the base's own template")

    method: Literal["sft"] = Field("sft", description="training objective: sft (supervised fine-tuning)")
    r: int = Field(16, ge=1, description="rank of the adapter")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha: updates are scaled by alpha/r (unset: 2r)")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Annotated[str, BeforeValidator(_joined)] = Field(
        "all-linear", min_length=1, description="all-linear, attention, qv, or names of layers joined by commas"
    )
    rslora: bool = Field(False, description="scale by alpha/sqrt(r)")
    dora: bool = Field(False, description="train DoRA (not served by manylora)")
    lint: Literal["strict", "warn"] = Field("warn", description="stop, or warn, if a server would refuse the adapter")

    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate (unset: 1e-3 for a base below 1B parameters, else 2e-4)"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate schedule")
    warmup_steps: int | None = Field(None, ge=0, description="steps to the peak learning rate (unset: 3%, at least 5)")
    epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps (unset: from --epochs)")
    batch_size: int = Field(4, ge=1, description="rows per batch; with --packing, packed rows")
    accumulation: int = Field(1, ge=1, description="gradient accumulation: batches per optimizer step")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="clip gradients to this norm")
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = Field(
        "auto", description="optimizer; auto is paged_adamw_8bit on CUDA, else adamw"
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="recompute activations to save memory; --no-gradient-checkpointing: never "
        "(unset: if memory is short)",
    )

    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations (unset: four per run)")
    early_stopping: int | None = Field(None, ge=1, description="stop after this many evaluations without improvement")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints (unset: at each evaluation)")
    resume: bool = Field(False, description="continue an interrupted run from its last checkpoint")
    report_to: Literal["tensorboard", "wandb", "none"] = Field("tensorboard", description="where to log the curves")

    min_json_validity: float | None = Field(None, ge=0, le=1, description="least share of answers that parse as JSON")
    min_exact_match: float | None = Field(None, ge=0, le=1, description="least share of answers that match exactly")
    min_stop_share: float | None = Field(
        None, ge=0, le=1, description="least share of answers that end with a stop token"
    )
    max_loss_ratio: float | None = Field(
        1.0, gt=0, description="greatest ratio of held-out losses, adapter to base; off: no limit"
    )
    max_divergence: float | None = Field(
        None, gt=0, description="greatest mean KL from the base on general prompts, nats per token"
    )
    judge_rows: int = Field(64, ge=1, description="held-out rows to answer")
    judge_tokens: int = Field(128, ge=1, description="longest answer")

    dry_run: bool = Field(False, description="check everything, train nothing")
    show: int = Field(0, ge=0, description="print this many examples with trained and masked tokens coloured")

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str) -> str:
        try:
            check_name(name)
        except AdapterNameError as error:
            raise ValueError(str(error)) from None
        return name

    @field_validator("publish")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"must begin with http:// or https:// (got {url!r})")
        return url

    @field_validator("out", "data_dir", "eval_file", "mix_general", "chat_template", mode="before")
    @classmethod
    def _named(cls, path: object) -> object:
        # Path("") is the working directory, which an unset variable in a script would then open.
        if path == "":
            raise ValueError("must not be empty")
        return path

    @field_validator("out", "data_dir", "eval_file", "mix_general", "chat_template")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return path and expand_home(path)

    @field_validator("data")
    @classmethod
    def _files(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(expand_home(Path(name))) if name.startswith("~") else name for name in names)

    @field_validator("max_loss_ratio", mode="before")
    @classmethod
    def _asked(cls, ratio: object) -> object:
        # YAML reads a bare off as false, which would be taken for 0.
        return None if ratio is False or ratio == "off" else ratio

    @model_validator(mode="after")
    def _fitting(self) -> "TrainSettings":
        for name in ("alias", "publish_anyway"):
            if getattr(self, name) and self.publish is None:
                raise ValueError(f"{flag(name)}: needs --publish")
        if self.skip_bad and self.too_long == "fail":
            raise ValueError("--skip-bad: would leave out the rows for which --too-long fail stops; choose one")
        return self

    @property
    def base(self) -> BaseOptions:
        """The options of the base to train on."""
        return BaseOptions(self.model, self.data_dir, self.device, self.quantization, self.dtype)

    @property
    def folder(self) -> Path:
        """The folder that the adapter is written to."""
        return (self.out or self.data_dir / "trained" / self.name).absolute()

    @property
    def lora_alpha(self) -> float:
        """``alpha``, or twice the rank."""
        return 2.0 * self.r if self.alpha is None else self.alpha


def read_settings(words: Sequence[str]) -> TrainSettings:
    """Return the settings from the words after ``manylora train`` and the YAML file among them.

    Prints the help and raises SystemExit for ``--help``. Raises ConfigError, one line per error.
    """
    return make_settings(parse(TrainSettings, words, "manylora train"))


def make_settings(given: Given) -> TrainSettings:
    """Return the settings from the command line and the YAML file it names. Raises ConfigError, one line per error."""
    words = given.pop("data", ())
    files = [word for word in words if word.lower().endswith(_FILE_ENDINGS)]
    if len(files) > 1:
        raise ConfigError(f"give one file of options at most (got {', '.join(files)})")
    values = _read_file(Path(files[0])) if files else {}
    if data := tuple(word for word in words if word not in files):
        given["data"] = data
    places = {name: f"{files[0]}: {name}" for name in values if name not in given}
    return TrainSettings(_places=places, **values | given)  # type: ignore[call-arg]  # of Options.__init__


def flag(field: str) -> str:
    """``"max_length"`` -> ``"--max-length"``, ``"r"`` -> ``"-r"``, ``"data"`` -> ``"DATA"``."""
    return TrainSettings.flag(field)


def _read_file(path: Path) -> dict[str, Any]:
    """Return the options in a YAML file. Raises ConfigError, also for duplicate keys, of which YAML would drop one."""
    try:
        text = expand_home(path).read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold options, one `name: value` a line")
    keys = [str(key.value).replace("-", "_") for key, _ in node.value]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{path}: {twice[0]}: is given twice")
    return {str(name).replace("-", "_"): value for name, value in values.items()}
