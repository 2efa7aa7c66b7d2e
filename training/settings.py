"""One frozen settings object: the options of ``manylora train``, from the command line and one flat YAML file.

An option on the command line wins over the same one in the file. What is wrong is told at once, one line each. Paths
are relative to the working directory, wherever the file lies.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped, unused-ignore]
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from adapters.errors import AdapterNameError
from adapters.registry.names import check_name
from bases.errors import ConfigError
from bases.option_errors import describe
from bases.options import BaseOptions, default_data

API_KEY = "MANYLORA_API_KEY"
"""The one option that is better not seen on a command line."""
_FILE_ENDINGS = (".yaml", ".yml")


def _one_or_more(value: object) -> object:
    """``"rows.jsonl"`` -> ``("rows.jsonl",)``: in the YAML file one file needs no list."""
    return (value,) if isinstance(value, str) else value


def _joined(value: object) -> object:
    """``["q_proj", "v_proj"]`` -> ``"q_proj,v_proj"``: in the YAML file layers may be a list."""
    return ",".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else value


def at_home(path: Path) -> Path:
    """``path`` with ``~`` resolved."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{str(path)!r} names a home folder that is not known") from None


def _key_of_environment() -> SecretStr | None:
    key = os.environ.get(API_KEY)
    return SecretStr(key) if key else None


class TrainSettings(BaseSettings):
    """Trains a LoRA adapter on a file of examples, judges it and publishes it. DATA may be one YAML file of options."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        cli_kebab_case=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags="toggle",
        cli_parse_none_str="off",
    )

    data: CliPositionalArg[Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]] = Field(
        min_length=1, description="files of examples (JSONL, JSON, CSV, Parquet), FILE=2.5 for a weight; or config.yaml"
    )
    name: str = Field(description="of the adapter")
    out: Path | None = Field(None, description="folder to write the adapter to (unset: trained/NAME under --data-dir)")
    publish: str | None = Field(
        None, pattern="^https?://", description="address of a running server that gets the adapter"
    )
    api_key: SecretStr | None = Field(
        default_factory=_key_of_environment,
        description=f"that the server of --publish asks for (unset: {API_KEY})",
    )
    alias: str | None = Field(None, min_length=1, description="name on the server that then means the new version")
    publish_anyway: bool = Field(False, description="publish although the judgement failed")

    model: str = Field("demo", min_length=1, description="demo, a Hugging Face folder, a GGUF file, or a hub id")
    data_dir: Path = Field(
        default_factory=default_data, description="folder for bases and adapters (unset: manylora in XDG_DATA_HOME)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    quantization: Literal["nf4", "none"] = Field("nf4", description="of the base's linear layers; nf4 is QLoRA")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="of activations; auto is bf16")

    format: Literal["auto", "alpaca", "sharegpt", "chat", "completion", "text"] = Field(
        "auto", description="of the examples"
    )
    eval_file: Path | None = Field(None, description="held-out examples (unset: a share of the data)")
    eval_share: float = Field(0.1, ge=0, lt=1, description="share of the data that is held out")
    seed: int = Field(0, ge=0, lt=2**32, description="of every random choice")
    mix_general: Path | None = Field(None, description="general examples to mix in against forgetting")
    mix_share: float = Field(0.15, gt=0, lt=1, description="share of the training rows that are general")
    skip_bad: bool = Field(False, description="leave out rows that cannot be trained on, and say how many")
    too_long: Literal["drop", "truncate", "fail"] = Field("drop", description="what becomes of rows over --max-length")
    max_length: int | None = Field(None, ge=2, description="tokens in a row (unset: 1024, or the context if less)")
    packing: bool = Field(False, description="join short rows, so that no padding is computed")
    chat_template: Path | None = Field(None, description="Jinja file to use instead of the base's own template")

    method: Literal["sft"] = Field("sft", description="what is learned from a row: sft, to give its answers")
    r: int = Field(16, ge=1, description="rank of the adapter")
    alpha: float | None = Field(None, gt=0, description="numerator of the scale alpha/r (unset: 2r)")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the adapter's input")
    targets: Annotated[str, BeforeValidator(_joined)] = Field(
        "all-linear", min_length=1, description="all-linear, attention, qv, or names of layers joined by commas"
    )
    rslora: bool = Field(False, description="scale by alpha/sqrt(r)")
    dora: bool = Field(False, description="DoRA: learn a magnitude for each output as well")
    lint: Literal["strict", "warn"] = Field("warn", description="whether a server's refusal foreseen stops the run")

    learning_rate: float | None = Field(
        None, gt=0, description="at its highest (unset: 1e-3 for a base below 1B parameters, else 2e-4)"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the learning rate")
    warmup_steps: int | None = Field(None, ge=0, description="steps to the highest rate (unset: 3%, at least 5)")
    epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps (unset: by --epochs)")
    batch_size: int = Field(4, ge=1, description="rows in a batch; with --packing, packed rows")
    accumulation: int = Field(1, ge=1, description="batches in an optimizer step")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = Field(
        "auto", description="auto is paged_adamw_8bit on CUDA, else adamw"
    )
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations instead of keeping them (unset: where memory calls for it)"
    )

    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations (unset: four in a run)")
    early_stopping: int | None = Field(None, ge=1, description="evaluations without improvement that end the run")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints (unset: with each evaluation)")
    resume: bool = Field(False, description="go on from the last checkpoint of a run that was cut off")
    report_to: Literal["tensorboard", "wandb", "none"] = Field("tensorboard", description="where the curves go")

    min_json_validity: float | None = Field(None, ge=0, le=1, description="share of held-out answers that parse")
    min_exact_match: float | None = Field(None, ge=0, le=1, description="share of held-out answers that are equal")
    min_stop_share: float | None = Field(None, ge=0, le=1, description="share of held-out answers that end")
    max_loss_ratio: float | None = Field(
        1.0, gt=0, description="held-out loss of the adapter over the base's; off asks nothing"
    )
    max_divergence: float | None = Field(
        None, gt=0, description="mean KL from the base on general prompts, in nats a token"
    )
    judge_rows: int = Field(64, ge=1, description="held-out rows that are answered")
    judge_tokens: int = Field(128, ge=1, description="tokens of an answer")

    dry_run: bool = Field(False, description="check everything, train nothing")
    show: int = Field(0, ge=0, description="print so many examples, trained and masked tokens in different colours")

    def __init__(self, _places: Mapping[str, str] | None = None, **values: Any) -> None:
        """From keyword arguments alone. Raises ConfigError, one line per error.

        ``_places`` says where a value was written, for the message: its flag unless told otherwise.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines = (_line(detail, _places or {}) for detail in error.errors())
            raise ConfigError("\n".join(lines)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Not the environment, but for the API key: a variable called NAME or FORMAT was not meant for us."""
        return (init_settings,)

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str) -> str:
        try:
            check_name(name)
        except AdapterNameError as error:
            raise ValueError(str(error)) from None
        return name

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
        return path and at_home(path)

    @field_validator("data")
    @classmethod
    def _files(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(at_home(Path(name))) if name.startswith("~") else name for name in names)

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
        """Which base to train on."""
        return BaseOptions(self.model, self.data_dir, self.device, self.quantization, self.dtype)

    @property
    def folder(self) -> Path:
        """Where the adapter is written."""
        return (self.out or self.data_dir / "trained" / self.name).absolute()

    @property
    def lora_alpha(self) -> float:
        """``alpha``, or twice the rank."""
        return 2.0 * self.r if self.alpha is None else self.alpha


def read_settings(argv: Sequence[str]) -> TrainSettings:
    """The settings from the words after ``manylora train`` and the YAML file among them.

    Prints the help and exits on ``--help``. Raises ConfigError, one line per error.
    """
    flags = _read_flags(argv)
    words = flags.pop("data", [])
    files = [word for word in words if word.lower().endswith(_FILE_ENDINGS)]
    if len(files) > 1:
        raise ConfigError(f"one file of options at most (got {', '.join(files)})")
    values = _read_file(Path(files[0])) if files else {}
    places = {name: f"{files[0]}: {name}" for name in values if name not in flags}
    if data := [word for word in words if word not in files]:
        flags["data"] = tuple(data)
    return TrainSettings(places, **values | flags)


def flag(field: str) -> str:
    """``"max_length"`` -> ``"--max-length"``, ``"r"`` -> ``"-r"``; the data have no flag."""
    if field == "data":
        return "DATA"
    return f"-{field}" if len(field) == 1 else f"--{field.replace('_', '-')}"


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    try:
        source = CliSettingsSource[Any](TrainSettings, cli_parse_args=list(argv), cli_prog_name="manylora train")
        return dict(source())
    except SettingsError as error:
        raise ConfigError(str(error).removeprefix("error parsing CLI: ")) from None


def _read_file(path: Path) -> dict[str, Any]:
    """A flat mapping; a key that stands twice would otherwise be lost in silence."""
    try:
        text = at_home(path).read_text(encoding="utf-8")
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


def _line(detail: ErrorDetails, places: Mapping[str, str]) -> str:
    """One error of pydantic as ``--r: must be at least 1 (got 0)``, or ``config.yaml: r: must be ...``."""
    if not detail["loc"]:
        return str(detail["ctx"]["error"])
    name, *inside = map(str, detail["loc"])
    where = ".".join([places.get(name, flag(name)), *inside])
    if detail["type"] == "string_pattern_mismatch":
        return f"{where}: must begin with http:// or https:// (got {detail['input']!r})"
    return describe(detail, where)
