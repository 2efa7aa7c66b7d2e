"""Exports base and adapter as plain merged weights, and checks them against the unmerged model.

Weights are never merged in 4 bits: rounding the sum to NF4 again would erase the adapter. By default the adapter is
merged onto the base's DEQUANTISED weights, which it was trained on and which the server serves. Merging it onto the
``original`` weights gives another model, sometimes a better one: the adapter has learned to compensate for rounding
errors that the original weights do not have.
"""

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from rich.filesize import decimal
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from adapters.format.files import ORIGIN
from adapters.format.spec import AdapterSpec
from adapters.format.verify import verify
from adapters.format.weights import AdapterWeights, read_weights
from bases.base import Base, load_base
from bases.errors import ConfigError, ManyloraError
from bases.file_modes import apply_umask
from bases.options import BaseOptions
from training.export.divergence import (
    Divergence,
    DivergenceLimit,
    ModelOutputs,
    collect_outputs,
    compare,
    compute_exactly,
    encode_prompts,
)
from training.export.gguf import check_gguf, write_gguf
from training.export.shards import MergedWeights, Shards, write_shards
from training.progress_bar import Say, progress_bar
from training.publish.card import CHAT_TEMPLATE_FILE
from training.run.library_logging import quiet_libraries

Onto = Literal["dequantized", "original"]
DType = Literal["bf16", "fp16", "fp32"]
Format = Literal["safetensors", "gguf"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_RANK = 65536
"""Maximum rank. It is large, because no device has to hold the adapter."""
GENERATION = "generation_config.json"

LIMITS = {
    "bf16": DivergenceLimit(0.02, 0.85),
    "fp16": DivergenceLimit(0.001, 0.97),
    "fp32": DivergenceLimit(1e-5, 0.999),
}
"""Maximum divergence of the reloaded export from the unmerged base + adapter, both computed in float32.

Measured on the demo model, for random adapters that move it by a KL of 0.05 and of several nats: KL 0.0003 and 0.004 in
bf16 (same token at 100% and 92% of positions), 6e-6 and 6e-5 in fp16, 5e-10 in fp32."""


class ExportDiverges(ManyloraError):
    """The exported weights do not behave like base + adapter."""

    def __init__(self, message: str, divergence: Divergence | None = None) -> None:
        self.divergence = divergence
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A finished export; also saved with it, as ``manylora.json``."""

    out: Path
    base: str
    base_fingerprint: str
    adapter: str | None
    """SHA-256 of the adapter's content, if any."""
    onto: Onto
    dtype: DType
    format: Format
    size_bytes: int
    """Size of the weights."""
    seconds: float
    effect: Divergence | None
    """Divergence of base + adapter, unmerged, from the base; None without an adapter."""
    divergence: Divergence
    """Divergence of the export from the unmerged adapter on the weights it was merged onto."""
    from_trained: Divergence
    """Divergence of the export from the adapter on the base it was trained on; equal to ``divergence`` if merged onto
    that base."""

    def lines(self) -> Iterator[str]:
        """Yield the report as lines of text."""
        yield f"{self.out}: {decimal(self.size_bytes)} of {self.dtype} weights in {self.seconds:.0f} s"
        if self.effect:
            yield f"the adapter changes the base by KL {self.effect.mean_kl:.2g}"
        yield f"merged against unmerged: {self.divergence}"
        if self.from_trained != self.divergence:
            yield f"merged against the adapter on the 4-bit base it was trained on: {self.from_trained}"
            yield (
                "this second divergence is expected, since the adapter was trained on the 4-bit weights and merged "
                "onto the original ones; evaluate the export on held-out data before you use it, or export with --onto "
                "dequantized"
            )


@dataclass(frozen=True, slots=True)
class _ExportOptions:
    """The options of an export."""

    adapter: Path | None
    name: str | None
    """Name of the adapter; None without one."""
    base: BaseOptions
    onto: Onto
    dtype: DType
    format: Format
    max_shard_bytes: int
    any_base: bool
    any_fields: bool
    say: Say


@dataclass(frozen=True, slots=True)
class _Reference:
    """A base's files, and the outputs of base + adapter, unmerged, to compare the export with. The model is freed."""

    name: str
    folder: Path
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    adapter: AdapterWeights | None
    outputs: ModelOutputs
    effect: Divergence | None
    """Divergence of base + adapter from the base."""


def export(
    adapter: Path | None,
    base: BaseOptions,
    out: Path,
    *,
    name: str | None = None,
    onto: Onto = "dequantized",
    dtype: DType = "bf16",
    format: Format = "safetensors",
    max_shard_bytes: int = 5 << 30,
    allow_base_mismatch: bool = False,
    allow_unknown_fields: bool = False,
    keep_failed: bool = False,
    say: Say = lambda _: None,
) -> ExportReport:
    """Merge the PEFT folder ``adapter`` into ``base``, write the weights to ``out``, and check them.

    Runs on the CPU. The merge holds one shard in memory (gguf: one tensor); the checks before and after it hold the
    whole model, after it with 4 bytes per parameter. ``onto`` has no effect if the base is not quantised.

    ``name`` is the adapter's name, by default its folder's; it also names a gguf file. ``say`` gets a line for each
    slow step.

    Raises ConfigError for options, BaseRejected or AdapterRejected for what cannot be merged, and ExportDiverges if the
    reloaded export does not behave like base + adapter. Then nothing is kept, or with ``keep_failed`` ``<out>.failed``.
    """
    name = name or (adapter.resolve().name if adapter else None)
    base = dataclasses.replace(base, device="cpu")
    options = _ExportOptions(
        adapter, name, base, onto, dtype, format, max_shard_bytes, allow_base_mismatch, allow_unknown_fields, say
    )
    _check_options(options, out)
    started = time.monotonic()
    trained, merged_onto = _references(options)
    weights = MergedWeights(Shards(merged_onto.folder), trained.adapter, DTYPES[dtype])
    _check_disk_space(out, weights.size_bytes)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        _write(options, merged_onto, weights, folder)
        say("reading the export back")
        outputs = _reload(options, folder, merged_onto)
        seconds = time.monotonic() - started
        report = _report(options, out, (trained, merged_onto), outputs, weights.size_bytes, seconds)
        (folder / ORIGIN).write_text(json.dumps(dataclasses.asdict(report), indent=1, default=str))
        apply_umask(folder)
        _check_divergence(report, folder, keep_failed)
        folder.rename(out)
    return report


def _references(options: _ExportOptions) -> tuple[_Reference, _Reference]:
    """Return the base that the adapter was trained on, and the one to merge it onto, which may be the same."""
    trained = _open(options, options.base)
    if options.onto == "dequantized" or options.base.quantization == "none":
        return trained, trained
    options.say("loading the original weights")
    return trained, _open(options, dataclasses.replace(options.base, quantization="none"), trained)


def _report(
    options: _ExportOptions,
    out: Path,
    references: tuple[_Reference, _Reference],
    outputs: ModelOutputs,
    size_bytes: int,
    seconds: float,
) -> ExportReport:
    """Compare ``outputs`` of the export with its ``references``: the base trained on, and the one merged onto."""
    trained, merged_onto = references
    return ExportReport(
        out=out,
        base=trained.name,
        base_fingerprint=trained.fingerprint,
        adapter=trained.adapter.spec.id if trained.adapter else None,
        onto=options.onto,
        dtype=options.dtype,
        format=options.format,
        size_bytes=size_bytes,
        seconds=seconds,
        effect=merged_onto.effect,
        divergence=compare(merged_onto.outputs, outputs),
        from_trained=compare(trained.outputs, outputs),
    )


def _check_options(options: _ExportOptions, out: Path) -> None:
    """Raise ConfigError for invalid options, before anything slow."""
    for option, choices in (("onto", Onto), ("dtype", DType), ("format", Format)):
        value = getattr(options, option)
        if value not in get_args(choices):
            raise ConfigError(f"--{option}: must be one of {', '.join(get_args(choices))} (got {value!r})")
    if options.max_shard_bytes < 1:
        raise ConfigError(f"--max-shard-gib: must be above 0 (got {options.max_shard_bytes})")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out: {out} exists and is not an empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None


def _check_disk_space(out: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    # 64 MiB for vocabulary and metadata.
    needed = size_bytes + (64 << 20)
    if free < needed:
        raise ConfigError(
            f"--out: needs {needed / 2**30:.1f} GiB, but {out.parent} has only {free / 2**30:.1f} GiB free"
        )


def _open(options: _ExportOptions, base_options: BaseOptions, trained: _Reference | None = None) -> _Reference:
    """Load a base and record the outputs of base + adapter, unmerged. The model is freed on return.

    The merge reads the base's files, not this model: a forward pass may have repacked the model's weights.
    """
    base = load_base(base_options, options.say)
    # The original weights have another fingerprint; the adapter was checked against the base it was trained on.
    spec = _verified(options, base, any_base=options.any_base or trained is not None)
    tokenizer = base.tokenizer
    folder = Path(str(base.model.name_or_path))
    _use_template(tokenizer, options.adapter)
    if options.format == "gguf":
        check_gguf(folder, tokenizer)
    weights = read_weights(options.adapter, spec) if options.adapter and spec else None
    compute_exactly(base.model)
    with quiet_libraries():
        model = PeftModel.from_pretrained(base.model, options.adapter) if options.adapter else base.model
    prompts, effect = encode_prompts(tokenizer), None
    asked = len(prompts) * (2 if options.adapter else 1)
    what = "base and adapter, unmerged" if options.adapter else "the base"
    with progress_bar(f"answers of {what}", asked, options.say) as advance:
        outputs = collect_outputs(model, prompts, trained.outputs if trained else None, advance)
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                effect = compare(outputs, collect_outputs(model, prompts, outputs, advance))
    return _Reference(base.name, folder, base.layout.fingerprint, tokenizer, weights, outputs, effect)


def _verified(options: _ExportOptions, base: Base, any_base: bool) -> AdapterSpec | None:
    if options.adapter is None:
        return None
    return verify(options.adapter, base.layout, MAX_RANK, any_base=any_base, any_fields=options.any_fields)


def _use_template(tokenizer: PreTrainedTokenizerBase, adapter: Path | None) -> None:
    """Use the chat template that the adapter was trained with, if it has its own."""
    if adapter and (adapter / CHAT_TEMPLATE_FILE).is_file():
        tokenizer.chat_template = (adapter / CHAT_TEMPLATE_FILE).read_text()


def _write(options: _ExportOptions, base: _Reference, weights: MergedWeights, folder: Path) -> None:
    """Write all files of the export except the report."""
    with progress_bar(
        f"merging and writing {options.dtype} weights", weights.size_bytes, options.say, in_bytes=True
    ) as advance:
        if options.format == "gguf":
            write_gguf(weights, base.folder, base.tokenizer, folder / _gguf_name(options, base), advance)
            return
        write_shards(weights.each(advance), folder, options.max_shard_bytes, options.say)
    config = AutoConfig.from_pretrained(base.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = weights.dtype
    config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    if (base.folder / GENERATION).is_file():
        shutil.copy(base.folder / GENERATION, folder)


def _reload(options: _ExportOptions, folder: Path, base: _Reference) -> ModelOutputs:
    """Load the export with plain transformers, as any program would, and return its outputs. Raises ExportDiverges."""
    file: dict[str, Any] = {"gguf_file": _gguf_name(options, base)} if options.format == "gguf" else {}
    unpack: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if file else {}
    # float32 holds the written weights exactly, and its activations are hardly rounded.
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file, **unpack).eval()
        prompts = encode_prompts(AutoTokenizer.from_pretrained(folder, **file))
    if prompts != encode_prompts(base.tokenizer):
        raise ExportDiverges("the exported tokenizer gives other token ids than the base's")
    with progress_bar("answers of the export", len(prompts), options.say) as advance:
        return collect_outputs(model, prompts, base.outputs, advance)


def _gguf_name(options: _ExportOptions, base: _Reference) -> str:
    """Return the gguf file's name, after the adapter, which distinguishes the exports of a base."""
    return f"{options.name or base.name}.gguf"


def _check_divergence(report: ExportReport, folder: Path, keep_failed: bool) -> None:
    """Raise ExportDiverges if merged and unmerged differ by more than rounding, or by half of the adapter's effect."""
    limit, found = LIMITS[report.dtype], report.divergence
    if found.within(limit) and (report.effect is None or found.mean_kl < report.effect.mean_kl / 2):
        return
    kept = "nothing was kept"
    if keep_failed:
        failed = report.out.with_name(f"{report.out.name}.failed")
        if failed.exists():
            shutil.rmtree(failed)
        folder.rename(failed)
        kept = f"it is in {failed}"
    effect = f", and half of the adapter's effect is KL {report.effect.mean_kl / 2:.2g}" if report.effect else ""
    raise ExportDiverges(
        f"the merged model differs from base + adapter: {found}; rounding to {report.dtype} explains at most KL "
        f"{limit.mean_kl:g} and {1 - limit.top1:.1%} other tokens{effect}; {kept}",
        found,
    )
