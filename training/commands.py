"""``manylora train`` and ``manylora export`` on the command line.

Exit status 0; 1 for a failure; 2 for a bad option or bad data; 3 where an adapter was trained and kept, but the
judgement failed, so it was not published.
"""

import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from adapters.errors import AdapterError
from adapters.format.files import CONFIG, ORIGIN, read_json
from bases.errors import ConfigError
from bases.options import BaseOptions, default_data

BAD_DATA = 2

export_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def run_train(words: Sequence[str]) -> int:
    """From the words after ``manylora train``. Raises what stands in the way; bad data is told here."""
    from training.settings import read_settings

    settings = read_settings(words)
    from training.data.conversation import DataError
    from training.run.job import Job

    try:
        # Of the processes that `accelerate launch` starts, one tells.
        return Job(settings, Console(quiet=os.environ.get("RANK", "0") != "0")).run()
    except DataError as error:
        sys.stderr.write(f"manylora: {error}\n")
        return BAD_DATA


def run_export(words: Sequence[str]) -> int:
    """From the words after ``manylora export``."""
    try:
        export_app(list(words), prog_name="manylora export")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except AdapterError as error:
        sys.stderr.write(f"manylora: {error}\n")
        return 1
    return 0


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


def _at_home(path: Path) -> Path:
    """``path`` with ``~`` resolved. Raises ConfigError."""
    from training.settings import at_home

    try:
        return at_home(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def find_adapter(name: str, data: Path) -> Path:
    """The folder of an adapter that was trained here under a name, or that a path leads to. Raises ConfigError."""
    for folder in (data / "trained" / name, _at_home(Path(name))):
        if (folder / CONFIG).is_file():
            return folder
    raise ConfigError(f"there is no adapter {name!r}: neither under {data / 'trained'} nor as a folder")


@export_app.command()
def _export(
    adapter: Annotated[
        str | None,
        typer.Argument(metavar="NAME_OR_DIR", help="adapter; without one, the base itself", show_default=False),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist, or be empty")],
    onto: Annotated[
        Literal["dequantized", "original"],
        typer.Option(help="weights to merge onto: the dequantised 4-bit ones it was trained on, or the source's own"),
    ] = "dequantized",
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="of the weights")] = "bf16",
    format: Annotated[
        Literal["safetensors", "gguf"], typer.Option(help="for transformers and vLLM, or for llama.cpp")
    ] = "safetensors",
    merge: Annotated[str | None, typer.Option(help="several adapters by weight, e.g. legal=0.7,german=0.3")] = None,
    method: Annotated[Literal["linear", "cat", "svd", "ties", "dare_ties"], typer.Option(help="of --merge")] = "linear",
    rank: Annotated[int | None, typer.Option(min=1, help="of a merge by svd, ties or dare_ties")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="with --merge: write an adapter, not the whole model")
    ] = False,
    max_shard_gib: Annotated[float, typer.Option(min=0.01, help="size of a file of weights")] = 5.0,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="take an adapter that names another base")
    ] = False,
    allow_unknown_fields: Annotated[
        bool, typer.Option("--allow-unknown-fields", help="take an adapter whose config has fields that are not known")
    ] = False,
    keep_failed: Annotated[bool, typer.Option("--keep-failed", help="keep an export that diverges")] = False,
    model: Annotated[
        str | None, typer.Option(help="the base, as for serve (unset: what the adapter was trained on, or demo)")
    ] = None,
    quantization: Annotated[
        Literal["nf4", "none"] | None, typer.Option(help="of the base (unset: as the adapter was trained, or nf4)")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder for bases and adapters")] = None,
) -> None:
    """Write base and adapter as plain weights, reload them, and compare them with what they were made from."""
    data = default_data() if data_dir is None else _at_home(data_dir).absolute()
    out = _at_home(out)
    if merge is not None and adapter is not None:
        raise ConfigError("--merge: names the adapters itself; leave NAME_OR_DIR out")
    if adapter_only and merge is None:
        raise ConfigError("--adapter-only: goes with --merge; a single adapter is one already")
    if rank is not None and merge is None:
        raise ConfigError("--rank: goes with --merge")
    if not math.isfinite(max_shard_gib):
        raise ConfigError(f"--max-shard-gib: must be a finite number (got {max_shard_gib})")
    parts = [] if merge is None else [(find_adapter(name, data), weight) for name, weight in _weighted(merge)]
    folder = None if adapter is None else find_adapter(adapter, data)
    base = _base(folder or (parts[0][0] if parts else None), data, model, quantization)
    if parts:
        _check_merge(parts, out, method, rank, allow_base_mismatch)
    allowed = {"allow_base_mismatch": allow_base_mismatch, "allow_unknown_fields": allow_unknown_fields}
    with tempfile.TemporaryDirectory() as temporary:
        if parts:
            folder = out if adapter_only else Path(temporary, "merged")
            _merge(parts, base, folder, {"method": method, "rank": rank, **allowed})
        if not adapter_only:
            name = "-".join(part.resolve().name for part, _ in parts) or None
            options = {"onto": onto, "dtype": dtype, "format": format, "keep_failed": keep_failed, **allowed}
            _write(folder, base, out, {"name": name, "max_shard_bytes": int(max_shard_gib * 2**30), **options})


def _base(
    adapter: Path | None, data: Path, model: str | None, quantization: Literal["nf4", "none"] | None
) -> BaseOptions:
    """The base in the form that ``adapter`` was trained on, as far as its manifest says, and no option says otherwise.

    Raises ConfigError where it was trained on a file or folder, which may be anywhere by now.
    """
    said = read_json(adapter, ORIGIN) if adapter and (adapter / ORIGIN).is_file() else {}
    stored, trained_on = said.get("quantization", {}), said.get("base", {"model": "demo"})
    if not isinstance(stored, dict) or not isinstance(trained_on, dict) or not {"model"} <= trained_on.keys():
        raise ConfigError(f"{adapter}: its {ORIGIN} does not say which base, in what form")
    if model is None and trained_on["model"] is None:
        raise ConfigError(f"--model: is needed; {adapter} was trained on {trained_on.get('name')}, a file or folder")
    float32 = "float32" in (stored.get("compute_dtype"), stored.get("dtype"))
    return BaseOptions(
        model=model or trained_on["model"],
        data=data,
        device="cpu",
        quantization=quantization or stored.get("method", "nf4"),
        dtype="fp32" if float32 else "auto",
    )


def _check_merge(parts: list[tuple[Path, float]], out: Path, method: str, rank: int | None, any_base: bool) -> None:
    """Raises what stands in the way of the merge, before the base is opened, which takes long."""
    from bases import nf4  # noqa: F401  (before PEFT, which would import bitsandbytes as it comes)
    from training.export.merge import check_merge

    check_merge(parts, out, method, rank, any_base=any_base)


def _merge(parts: list[tuple[Path, float]], base: BaseOptions, out: Path, options: dict[str, Any]) -> None:
    from bases.base import load_base
    from training.export.merge import merge

    merged = merge(parts, load_base(base, _say).layout, out, say=_say, **options)
    _say(f"merged {len(parts)} adapters into one of rank {merged.spec.rank}; {merged.lost:.2%} of the update was lost")


def _write(adapter: Path | None, base: BaseOptions, out: Path, options: dict[str, Any]) -> None:
    from bases import nf4  # noqa: F401  (before PEFT, which would import bitsandbytes as it comes)
    from training.export.export import export

    for line in export(adapter, base, out, say=_say, **options).lines():
        _say(line)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
