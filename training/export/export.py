"""Export: base and adapter folded into plain weights, checked against what they were made from.

Merging never happens inside 4 bits: rounding the sum to NF4 again would erase the adapter. The default is to merge onto
the base's DEQUANTISED weights, which are what the adapter was trained on and what the server serves. Merging onto the
source's ``original`` weights gives another model, sometimes a better one: the adapter has learned to make up for the
rounding of weights that are no longer rounded.
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
from bases.file_modes import make_ordinary
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
from training.publish.card import CHAT_TEMPLATE
from training.run.library_logging import quiet_libraries

Onto = Literal["dequantized", "original"]
DType = Literal["bf16", "fp16", "fp32"]
Format = Literal["safetensors", "gguf"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_RANK = 65536
"""An adapter may have any rank here: no device has to hold it."""
GENERATION = "generation_config.json"

LIMITS = {
    "bf16": DivergenceLimit(0.02, 0.85),
    "fp16": DivergenceLimit(0.001, 0.97),
    "fp32": DivergenceLimit(1e-5, 0.999),
}
"""How far the reloaded export may be from base + adapter, unmerged, both computed in float32.

Seen on the demo model, for random adapters that move it by a KL of 0.05 and of several nats: KL 0.0003 and 0.004 in
bf16 (same token at 100% and 92% of positions), 6e-6 and 6e-5 in fp16, 5e-10 in fp32."""


class ExportDiverges(ManyloraError):
    """What was written is not what base and adapter say."""

    def __init__(self, message: str, divergence: Divergence | None = None) -> None:
        self.divergence = divergence
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A finished export; also kept with it, in ``manylora.json``."""

    out: Path
    base: str
    base_fingerprint: str
    adapter: str | None
    """Its content's sha256."""
    onto: Onto
    dtype: DType
    format: Format
    size_bytes: int
    """Of the weights."""
    seconds: float
    effect: Divergence | None
    """Of the adapter itself: how far it moves the base, unmerged."""
    divergence: Divergence
    """From the adapter, unmerged, on the weights it was merged onto."""
    from_trained: Divergence
    """From the adapter on the base it was trained on; the same where it was merged onto that."""

    def lines(self) -> Iterator[str]:
        """The report in words."""
        yield f"{self.out}: {decimal(self.size_bytes)} of {self.dtype} weights in {self.seconds:.0f} s"
        if self.effect:
            yield f"the adapter moves the base by KL {self.effect.mean_kl:.2g}"
        yield f"merged against unmerged: {self.divergence}"
        if self.from_trained != self.divergence:
            yield f"merged against what was trained, on the 4-bit base: {self.from_trained}"
            yield (
                "that second distance is expected: the adapter was trained on the 4-bit weights, and this is the "
                "original's; judge it on held-out data before you use it, or export onto the dequantised weights"
            )


@dataclass(frozen=True, slots=True)
class _ExportRequest:
    """What was asked for."""

    adapter: Path | None
    name: str | None
    """Of the adapter; None where there is none."""
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
    """A base's files, and what was seen of it in memory before it was let go."""

    name: str
    folder: Path
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    adapter: AdapterWeights | None
    observed: ModelOutputs
    effect: Divergence | None
    """Of the adapter: how far it moves the base."""


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
    """Write ``base``, in the form that the PEFT folder ``adapter`` was trained on, with it merged in, to ``out``.

    Runs on the CPU. The merge holds one shard in memory (gguf: one tensor); the checks before and after it hold the
    model, afterwards with 4 bytes a parameter. ``onto`` means nothing for a base that is not quantised.

    ``name`` is the adapter's (unset: its folder's), and a gguf file's; ``say`` gets a line for each slow step.

    Raises ConfigError for options, BaseRejected or AdapterRejected for what cannot be merged, and ExportDiverges where
    the reloaded result is not what went in: then nothing is left, or, with ``keep_failed``, ``<out>.failed``.
    """
    base = dataclasses.replace(base, device="cpu")
    name = name or (adapter.resolve().name if adapter else None)
    request = _ExportRequest(
        adapter, name, base, onto, dtype, format, max_shard_bytes, allow_base_mismatch, allow_unknown_fields, say
    )
    _check_request(request, out)
    started = time.monotonic()
    trained = _open(request, base)
    merged_onto = trained
    if onto == "original" and base.quantization != "none":
        say("the same with the original weights")
        merged_onto = _open(request, dataclasses.replace(base, quantization="none"), trained)
    weights = MergedWeights(Shards(merged_onto.folder), trained.adapter, DTYPES[dtype])
    _check_room(out, weights.size_bytes)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        _write(request, merged_onto, weights, folder)
        say("reading it back")
        again = _reload(request, folder, merged_onto)
        report = ExportReport(
            out=out,
            base=trained.name,
            base_fingerprint=trained.fingerprint,
            adapter=trained.adapter.spec.id if trained.adapter else None,
            onto=onto,
            dtype=dtype,
            format=format,
            size_bytes=weights.size_bytes,
            seconds=time.monotonic() - started,
            effect=merged_onto.effect,
            divergence=compare(merged_onto.observed, again),
            from_trained=compare(trained.observed, again),
        )
        (folder / ORIGIN).write_text(json.dumps(dataclasses.asdict(report), indent=1, default=str))
        make_ordinary(folder)
        _judge(report, folder, keep_failed)
        folder.rename(out)
    return report


def _check_request(request: _ExportRequest, out: Path) -> None:
    """Options that cannot work, before anything slow."""
    for option, choices in (("onto", Onto), ("dtype", DType), ("format", Format)):
        value = getattr(request, option)
        if value not in get_args(choices):
            raise ConfigError(f"--{option}: must be one of {', '.join(get_args(choices))} (got {value!r})")
    if request.max_shard_bytes < 1:
        raise ConfigError(f"--max-shard-size: must be at least 1 byte (got {request.max_shard_bytes})")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out: {out} exists and is not an empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None


def _check_room(out: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    # Vocabulary and metadata come on top of the weights.
    needed = size_bytes + (64 << 20)
    if free < needed:
        raise ConfigError(f"--out: needs {needed / 2**30:.1f} GiB, and {out.parent} has {free / 2**30:.1f} GiB free")


def _open(request: _ExportRequest, options: BaseOptions, trained: _Reference | None = None) -> _Reference:
    """Look at base + adapter unmerged. The model goes when this returns: it has been run, its files have not."""
    base = load_base(options, request.say)
    # A base opened to be merged onto has a fingerprint of its own; the adapter has been checked against the trained.
    spec = _verified(request, base, any_base=request.any_base or trained is not None)
    tokenizer = base.tokenizer
    folder = Path(str(base.model.name_or_path))
    _use_template(tokenizer, request.adapter)
    if request.format == "gguf":
        check_gguf(folder, tokenizer)
    weights = read_weights(request.adapter, spec) if request.adapter and spec else None
    compute_exactly(base.model)
    with quiet_libraries():
        model = PeftModel.from_pretrained(base.model, request.adapter) if request.adapter else base.model
    prompts, effect = encode_prompts(tokenizer), None
    asked = len(prompts) * (2 if request.adapter else 1)
    what = "base and adapter, unmerged" if request.adapter else "the base"
    with progress_bar(f"answers of {what}", asked, request.say) as advance:
        observed = collect_outputs(model, prompts, trained.observed if trained else None, advance)
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                effect = compare(observed, collect_outputs(model, prompts, observed, advance))
    return _Reference(base.name, folder, base.layout.fingerprint, tokenizer, weights, observed, effect)


def _verified(request: _ExportRequest, base: Base, any_base: bool) -> AdapterSpec | None:
    if request.adapter is None:
        return None
    return verify(request.adapter, base.layout, MAX_RANK, any_base=any_base, any_fields=request.any_fields)


def _use_template(tokenizer: PreTrainedTokenizerBase, adapter: Path | None) -> None:
    """The chat template that the adapter was trained with, where it brings one."""
    if adapter and (adapter / CHAT_TEMPLATE).is_file():
        tokenizer.chat_template = (adapter / CHAT_TEMPLATE).read_text()


def _write(request: _ExportRequest, base: _Reference, weights: MergedWeights, folder: Path) -> None:
    """All files of the export but the report."""
    with progress_bar(
        f"merging and writing {request.dtype} weights", weights.size_bytes, request.say, in_bytes=True
    ) as advance:
        if request.format == "gguf":
            write_gguf(weights, base.folder, base.tokenizer, folder / _gguf_name(request, base), advance)
            return
        write_shards(weights.each(advance), folder, request.max_shard_bytes, request.say)
    config = AutoConfig.from_pretrained(base.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = weights.dtype
    config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    if (base.folder / GENERATION).is_file():
        shutil.copy(base.folder / GENERATION, folder)


def _reload(request: _ExportRequest, folder: Path, base: _Reference) -> ModelOutputs:
    """What plain transformers makes of the files, as any other program would read them."""
    file: dict[str, Any] = {"gguf_file": _gguf_name(request, base)} if request.format == "gguf" else {}
    unpack: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if file else {}
    # In float32 the weights are what was written, and nothing else is rounded.
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file, **unpack).eval()
        prompts = encode_prompts(AutoTokenizer.from_pretrained(folder, **file))
    if prompts != encode_prompts(base.tokenizer):
        raise ExportDiverges("the tokenizer read back from the export makes other tokens than the base's")
    with progress_bar("answers of what was read back", len(prompts), request.say) as advance:
        return collect_outputs(model, prompts, base.observed, advance)


def _gguf_name(request: _ExportRequest, base: _Reference) -> str:
    """The adapter's, which is what tells one export of a base from another."""
    return f"{request.name or base.name}.gguf"


def _judge(report: ExportReport, folder: Path, keep_failed: bool) -> None:
    """Only rounding may lie between merged and unmerged, and less of it than what the adapter does."""
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
    effect = f", and half of what the adapter does is KL {report.effect.mean_kl / 2:.2g}" if report.effect else ""
    raise ExportDiverges(
        f"the merged model is not base + adapter: {found}; rounding to {report.dtype} explains at most KL "
        f"{limit.mean_kl:g} and {1 - limit.top1:.1%} other tokens{effect}; {kept}",
        found,
    )
