"""The PEFT model to train, and a lint of whether servers will accept its adapter."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import set_seed

from adapters.errors import AdapterRejected
from adapters.format.peft_config import ALL_LINEAR, check_fields, read_config
from adapters.format.spec import BaseLayout
from bases.base import Base
from bases.errors import ConfigError
from training.model.dropout import Dropout
from training.run.library_logging import quiet_libraries
from training.settings import TrainSettings

ATTENTION = ("attn", "attention")
"""Substrings of the names of attention modules."""
QV = ("q_proj", "v_proj", "query", "value")
FUSED_QV = ("qkv_proj", "query_key_value", "Wqkv")
"""Layers that combine query, key and value."""
MAX_SERVED_RANK = 256
"""The largest ``--max-rank`` of this server."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank`` (0.32)."""
VLLM_DEFAULT_RANK = 16


@dataclass(frozen=True, slots=True)
class LintFinding:
    """Whether a server will accept the adapter, found before training."""

    level: Literal["refused", "note"]
    server: Literal["manylora", "vllm"]
    message: str


def lora_config(settings: TrainSettings, base: Base) -> LoraConfig:
    """Return PEFT's config of the adapter. Raises ConfigError if the base lacks a target layer."""
    alpha = settings.lora_alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # PEFT accepts fractions
        lora_dropout=settings.dropout,
        target_modules=_shortest_names(_targets(settings.targets, base.layout), base.layout),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )


@contextmanager
def new_peft_model(settings: TrainSettings, base: Base) -> Iterator[PeftModel]:
    """Add a new adapter, initialised from the seed, to the base; restore the base on exit."""
    set_seed(settings.seed)
    uses_cache = base.model.config.use_cache
    with quiet_libraries():
        model = get_peft_model(base.model, lora_config(settings, base))
    # PEFT would save the folder the model was loaded from, which is useless on another machine.
    model.peft_config["default"].base_model_name_or_path = base.name
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout and ".lora_dropout." in name:
            model.set_submodule(name, Dropout(module.p))
    try:
        yield model
    finally:
        model.unload()
        base.model.activation_checkpointing_disable()
        base.model.eval().requires_grad_(False)
        base.model.config.use_cache = uses_cache


def target_shapes(settings: TrainSettings, base: Base) -> dict[str, tuple[int, int]]:
    """Return target layer -> (in_features, out_features); for an embedding (width, rows)."""
    layers = _targets(settings.targets, base.layout)
    return {layer: base.layout.linears.get(layer) or _shape(base.model.get_submodule(layer)) for layer in layers}


def count_parameters(settings: TrainSettings, base: Base) -> int:
    """Return the number of trained parameters."""
    shapes = target_shapes(settings, base).values()
    return sum(settings.r * (inputs + outputs) + settings.dora * outputs for inputs, outputs in shapes)


def lint(settings: TrainSettings, base: Base) -> list[LintFinding]:
    """Return what manylora and vLLM will refuse or require, refusals first. Raises ConfigError as lora_config does."""
    refused = [LintFinding("refused", "manylora", reason) for reason in _refused_here(settings, base)]
    refused += [LintFinding("refused", "vllm", reason) for reason in _refused_by_vllm(settings)]
    if not refused and settings.r > VLLM_DEFAULT_RANK:
        rank = next(rank for rank in VLLM_RANKS if rank >= settings.r)
        return [LintFinding("note", "vllm", f"start it with --max-lora-rank {rank}")]
    return refused


def check_findings(settings: TrainSettings, findings: Iterable[LintFinding]) -> None:
    """Raise ConfigError if the server to publish to will refuse the adapter, or, with ``--lint strict``, any will."""
    for finding in findings:
        needed = finding.server == "manylora" and settings.publish is not None
        if finding.level == "refused" and (needed or settings.lint == "strict"):
            option = "--publish" if needed else "--lint strict"
            raise ConfigError(f"{option}: {finding.server} will refuse this adapter: {finding.message}")


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight.shape
    return inputs, outputs


def _targets(wanted: str, layout: BaseLayout) -> list[str]:
    """Return the full names of the layers selected by ``--targets``, in the base's order. Raises ConfigError."""
    names = list(layout.linears)
    match wanted:
        case "all-linear":
            chosen = names
        case "attention":
            chosen = [name for name in names if any(part in name.rpartition(".")[0] for part in ATTENTION)]
        case "qv":
            chosen = [name for name in names if _leaf(name) in QV] or [n for n in names if _leaf(n) in FUSED_QV]
        case _:
            return _named([word.strip() for word in wanted.split(",")], layout)
    if not chosen:
        raise ConfigError(f"--targets {wanted}: no such layer is known in this base; {_available_targets(layout)}")
    return chosen


def _named(words: Sequence[str], layout: BaseLayout) -> list[str]:
    """Return layers by their full names or by suffixes that start at a dot. Raises ConfigError."""
    names = [*layout.linears, *layout.unserved]
    for word in words:
        if not any(_ends_with(name, word) for name in names):
            raise ConfigError(f"--targets: this base has no layer {word!r}; {_available_targets(layout)}")
    return [name for name in names if any(_ends_with(name, word) for word in words)]


def _shortest_names(layers: Sequence[str], layout: BaseLayout) -> list[str]:
    """Return the last parts of the names, as other servers expect, or full names if those would match other layers."""
    leaves = sorted({_leaf(layer) for layer in layers})
    meant = {name for name in (*layout.linears, *layout.unserved) if _leaf(name) in leaves}
    return leaves if meant == set(layers) else list(layers)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ends_with(name: str, ending: str) -> bool:
    return bool(ending) and f".{name}".endswith(f".{ending}")


def _available_targets(layout: BaseLayout) -> str:
    return (
        f"available are {ALL_LINEAR}, attention, qv, and {', '.join(sorted({_leaf(name) for name in layout.linears}))}"
    )


def _refused_here(settings: TrainSettings, base: Base) -> list[str]:
    """Apply the same rules as registration; return the reasons for a refusal."""
    reasons = []
    if settings.r > MAX_SERVED_RANK:
        reasons.append(f"its rank is {settings.r}; 1 to {MAX_SERVED_RANK} are supported")
    with TemporaryDirectory() as folder:
        lora_config(settings, base).save_pretrained(folder)
        try:
            config = read_config(Path(folder))
            check_fields(config.unknown)
            config.targets(base.layout)
        except AdapterRejected as error:
            reasons.append(error.reason)
    return reasons


def _refused_by_vllm(settings: TrainSettings) -> list[str]:
    reasons = []
    if settings.r > VLLM_RANKS[-1]:
        reasons.append(f"its rank is {settings.r}; up to {VLLM_RANKS[-1]} are supported")
    if settings.dora:
        reasons.append("DoRA is not supported")
    return reasons
