"""``manylora train`` and ``manylora export``.

Exit status: 0; 1 for a failure; 2 for a bad option or bad data; 3 if the adapter was trained and kept, but failed the
judgement.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from adapters.format.files import CONFIG, ORIGIN, read_json
from bases import interrupts
from bases.command_line import Given, Options, single_command
from bases.errors import ConfigError
from bases.options import BaseOptions, default_data_dir
from training.settings import TrainSettings, expand_home, make_settings


class ExportSettings(Options):
    """Write a base with an adapter as merged weights, reload them, and compare their answers with the originals'.

    NAME_OR_FOLDER is an adapter; without one the base itself is written.

    Example: manylora export legal --out legal-merged
    """

    positional = "adapter"
    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "Output": ("adapter", "out", "format", "dtype", "onto", "max_shard_gib", "keep_failed"),
        "Several adapters": ("merge", "method", "rank", "adapter_only"),
        "Base": ("model", "quantization", "data_dir", "allow_base_mismatch", "allow_unknown_fields"),
    }
    metavars: ClassVar[Mapping[str, str]] = {
        "adapter": "NAME_OR_FOLDER",
        "out": "FOLDER",
        "merge": "NAME=WEIGHT,...",
        "model": "MODEL",
        "data_dir": "FOLDER",
    }

    adapter: tuple[str, ...] = Field((), max_length=1, description="adapter; without one, the base itself")
    out: Path = Field(description="folder to write; must be empty or not exist")
    format: Literal["safetensors", "gguf"] = Field(
        "safetensors", description="safetensors for transformers and vLLM, gguf for llama.cpp"
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="of the weights")
    onto: Literal["dequantized", "original"] = Field(
        "dequantized", description="base weights: the dequantised 4-bit ones of training, or the original ones"
    )
    max_shard_gib: float = Field(5.0, ge=0.01, description="largest file of weights")
    keep_failed: bool = Field(False, description="keep an export whose answers diverge")
    merge: str | None = Field(None, description="several adapters by weight, e.g. legal=0.7,german=0.3")
    method: Literal["linear", "cat", "svd", "ties", "dare_ties"] = Field("linear", description="how --merge merges")
    rank: int | None = Field(None, ge=1, description="rank of a merge by svd, ties or dare_ties")
    adapter_only: bool = Field(False, description="with --merge: write an adapter instead of the whole model")
    model: str | None = Field(None, description="the base, as for serve (unset: the adapter's own, or demo)")
    quantization: Literal["nf4", "none"] | None = Field(
        None, description="of the base (unset: as the adapter was trained, or nf4)"
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="folder for bases and adapters (unset: MANYLORA_DATA_DIR, or manylora in XDG_DATA_HOME)",
    )
    allow_base_mismatch: bool = Field(False, description="accept an adapter that names another base")
    allow_unknown_fields: bool = Field(False, description="accept an adapter whose config has unknown fields")

    @field_validator("out", "data_dir")
    @classmethod
    def _expanded(cls, path: Path) -> Path:
        return expand_home(path)

    @model_validator(mode="after")
    def _consistent(self) -> "ExportSettings":
        if self.merge is not None and self.adapter:
            raise ValueError("--merge: names the adapters itself; leave out NAME_OR_FOLDER")
        if self.adapter_only and self.merge is None:
            raise ValueError("--adapter-only: needs --merge; a single adapter is one already")
        if self.rank is not None and self.merge is None:
            raise ValueError("--rank: needs --merge")
        return self


def run_train(given: Given) -> int:
    """Run ``manylora train``. Raises ConfigError, DataError, TrainingError or PublishFailed."""
    settings = make_settings(given)
    from rich.console import Console

    from training.run.job import Job

    with interrupts.sigint_raises(), interrupts.sigterm_raises():
        # Of the processes that `accelerate launch` starts, only the first prints.
        return Job(settings, Console(quiet=os.environ.get("RANK", "0") != "0")).run()


def run_export(given: Given) -> int:
    """Run ``manylora export``. Raises ConfigError, BaseRejected, AdapterRejected or ExportDiverges."""
    settings = ExportSettings(**given)
    with interrupts.sigint_raises(), interrupts.sigterm_raises():
        _export(settings)
    return 0


train = single_command(TrainSettings, run_train)
export = single_command(ExportSettings, run_export)


def _weighted(text: str) -> list[tuple[str, float]]:
    """``"a=0.7,b=0.3"`` -> ``[("a", 0.7), ("b", 0.3)]``."""
    pairs = []
    for item in text.split(","):
        name, _, weight = item.rpartition("=")
        try:
            pairs.append((name.strip(), float(weight)))
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"--merge: must be NAME=WEIGHT,NAME=WEIGHT (got {item!r})")
    return pairs


def find_adapter(name: str, data: Path) -> Path:
    """Return the folder of an adapter: the one trained under this name, or the path itself. Raises ConfigError."""
    try:
        path = expand_home(Path(name))
    except ValueError as error:
        raise ConfigError(f"NAME_OR_FOLDER: {error}") from None
    for folder in (data / "trained" / name, path):
        if (folder / CONFIG).is_file():
            return folder
    raise ConfigError(f"there is no adapter {name!r}: neither under {data / 'trained'} nor as a folder")


def _export(settings: ExportSettings) -> None:
    data = settings.data_dir.absolute()
    weighted = [] if settings.merge is None else _weighted(settings.merge)
    parts = [(find_adapter(name, data), weight) for name, weight in weighted]
    folder = find_adapter(settings.adapter[0], data) if settings.adapter else None
    base = _base(folder or (parts[0][0] if parts else None), data, settings.model, settings.quantization)
    if parts:
        _check_merge(parts, settings.out, settings.method, settings.rank, settings.allow_base_mismatch)
    allowed = settings.model_dump(include={"allow_base_mismatch", "allow_unknown_fields"})
    with tempfile.TemporaryDirectory() as temporary:
        if parts:
            folder = settings.out if settings.adapter_only else Path(temporary, "merged")
            _merge(parts, base, folder, settings.model_dump(include={"method", "rank"}) | allowed)
        if not settings.adapter_only:
            name = "-".join(part.resolve().name for part, _ in parts) or None
            options = settings.model_dump(include={"onto", "dtype", "format", "keep_failed"}) | allowed
            options |= {"name": name, "max_shard_bytes": int(settings.max_shard_gib * 2**30)}
            _write(folder, base, settings.out, options)


def _base(
    adapter: Path | None, data: Path, model: str | None, quantization: Literal["nf4", "none"] | None
) -> BaseOptions:
    """Return the base that ``adapter`` was trained on, from its manifest; ``model`` and ``quantization`` override it.

    Raises ConfigError if the base was a file or folder, whose path the manifest does not have, and ``model`` is None.
    """
    manifest = read_json(adapter, ORIGIN) if adapter and (adapter / ORIGIN).is_file() else {}
    stored, trained_on = manifest.get("quantization", {}), manifest.get("base", {"model": "demo"})
    if not isinstance(stored, dict) or not isinstance(trained_on, dict) or not {"model"} <= trained_on.keys():
        raise ConfigError(f"{adapter}: its {ORIGIN} does not name the base and its quantization")
    if model is None and trained_on["model"] is None:
        raise ConfigError(
            f"--model: must be given, since {adapter} was trained on {trained_on.get('name')}, a file or folder"
        )
    float32 = "float32" in (stored.get("compute_dtype"), stored.get("dtype"))
    return BaseOptions(
        model=model or trained_on["model"],
        data_dir=data,
        device="cpu",
        quantization=quantization or stored.get("method", "nf4"),
        dtype="fp32" if float32 else "auto",
    )


def _check_merge(parts: list[tuple[Path, float]], out: Path, method: str, rank: int | None, any_base: bool) -> None:
    """Check the merge before the base is loaded, which takes long. Raises ConfigError or AdapterRejected."""
    from bases import nf4  # noqa: F401  (before PEFT, whose import of it may download code)
    from training.export.merge import check_merge

    check_merge(parts, out, method, rank, any_base=any_base)


def _merge(parts: list[tuple[Path, float]], base: BaseOptions, out: Path, options: dict[str, Any]) -> None:
    from bases.base import load_base
    from training.export.merge import merge

    merged = merge(parts, load_base(base, _say).layout, out, say=_say, **options)
    _say(f"merged {len(parts)} adapters into one of rank {merged.spec.rank}; {merged.lost:.2%} of the update was lost")


def _write(adapter: Path | None, base: BaseOptions, out: Path, options: dict[str, Any]) -> None:
    from bases import nf4  # noqa: F401  (before PEFT, whose import of it may download code)
    from training.export.export import export

    for line in export(adapter, base, out, say=_say, **options).lines():
        _say(line)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
