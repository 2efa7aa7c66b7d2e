"""Estimates the peak memory of a run, from the model, the rows and the settings, before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bases import machine
from bases.base import Base
from bases.errors import ConfigError
from bases.nf4 import Linear4bit
from training.data.packing import PackedRow
from training.data.rendering import UNTRAINED
from training.model.lora import count_parameters, target_shapes
from training.model.lora_patch import group_name
from training.settings import TrainSettings

TIGHT_SHARE = 0.8
"""Share of the free memory above which the estimate is called tight."""
WORKSPACE = 150 * 2**20
"""Bytes that the libraries allocate when a run starts."""
CERTAIN_SHARE = 0.6
"""A run is refused if even this share of its estimate exceeds the free memory. Estimates for the demo model were right
within a third."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a run by use, in bytes."""

    base: int
    """The frozen model, which is in memory already."""
    adapter: int
    """Weights, gradients and AdamW's two moments."""
    unpacked: int
    """The 4-bit layers' weights, dequantised once for the whole run; 0 if memory is too tight for that."""
    activations: int
    """What the backward pass needs of the largest batch, and one dequantised layer if ``unpacked`` is 0."""
    logits: int
    """Logits of the largest batch's trained positions, with their gradients."""
    checkpointing: bool
    """Whether activations are recomputed instead of kept: as set, or if memory is tight."""
    free: int
    """Free memory, not counting the base."""

    @property
    def more(self) -> int:
        """Memory needed besides the base."""
        return self.adapter + self.unpacked + self.activations + self.logits + WORKSPACE

    def __str__(self) -> str:
        parts = {
            "base": self.base,
            "adapter and optimizer": self.adapter,
            **({"unpacked weights": self.unpacked} if self.unpacked else {}),
            "activations (recomputed)" if self.checkpointing else "activations": self.activations,
            "logits": self.logits,
        }
        listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        tight = " (this is tight)" if self.more > TIGHT_SHARE * self.free else ""
        return f"memory: {listed}; {_gib(self.free)} free besides the base{tight}"


def estimate_memory(settings: TrainSettings, base: Base, rows: Sequence[PackedRow]) -> MemoryEstimate:
    """Return the memory needed for the largest batch that ``rows`` (trained and held out) can form."""
    longest = sorted((len(row.input_ids) for row in rows), reverse=True)[: settings.batch_size]
    trained = sorted((_trained(row) for row in rows), reverse=True)[: settings.batch_size]
    tokens = len(longest) * longest[0]
    found = MemoryEstimate(
        base=sum(tensor.nbytes for tensor in (*base.model.parameters(), *base.model.buffers())),
        adapter=count_parameters(settings, base) * _bytes_a_parameter(settings, base),
        unpacked=0,
        activations=_activations(settings, base, tokens) + _largest_layer(base),
        logits=_logits(base, sum(trained)),
        checkpointing=False,
        free=machine.free_memory(base.device),
    )
    wanted = settings.gradient_checkpointing
    if wanted or (wanted is None and found.more > TIGHT_SHARE * found.free):
        found = replace(
            found, activations=_recomputed(settings, base, tokens) + _largest_layer(base), checkpointing=True
        )
    unpacked = replace(found, unpacked=_unpacked(base), activations=found.activations - _largest_layer(base))
    return unpacked if unpacked.unpacked and unpacked.more <= TIGHT_SHARE * unpacked.free else found


def check_memory(need: MemoryEstimate, device: torch.device) -> None:
    """Raise ConfigError if the run cannot fit on ``device``, even if the estimate is too high."""
    if need.more * CERTAIN_SHARE > need.free:
        advice = "a smaller --batch-size with --accumulation, or a smaller --max-length"
        raise ConfigError(
            f"the run needs about {_gib(need.more)} besides the base, but only {_gib(need.free)} of {device.type} "
            f"memory are free; try {advice}"
        )


def _trained(row: PackedRow) -> int:
    return len(row.labels) - row.labels.count(UNTRAINED)


def _bytes_a_parameter(settings: TrainSettings, base: Base) -> int:
    """Return bytes per parameter: float32 weight and gradient, and two moments of 4 bytes, or of 1 in 8 bits."""
    eight_bit = settings.optimizer == "paged_adamw_8bit" or (
        settings.optimizer == "auto" and base.device.type == "cuda"
    )
    return 4 + 4 + (2 if eight_bit else 8)


def _activations(settings: TrainSettings, base: Base, tokens: int) -> int:
    """Return the bytes that the forward pass keeps for the backward pass.

    A frozen layer keeps nothing; attention, activation functions and norms keep about as much as the inputs and outputs
    of the linear layers, plus the norms' float32 inputs.
    """
    linears = base.dtype.itemsize * sum(sum(shape) for shape in base.layout.linears.values())
    norms = 2 * 4 * _width(base) * _layers(base)
    return tokens * (linears + norms + (_peft_adapter_bytes if settings.dora else _adapter_bytes)(settings, base))


def _adapter_bytes(settings: TrainSettings, base: Base) -> int:
    """Return bytes per token: each group's input and its dropout mask, once, and each layer's product with A."""
    shapes = target_shapes(settings, base)
    inputs = {group_name(name): inputs for name, (inputs, _) in shapes.items()}
    kept = (2 if settings.dropout else 1) * sum(inputs.values())
    return base.dtype.itemsize * (kept + settings.r * len(shapes))


def _peft_adapter_bytes(settings: TrainSettings, base: Base) -> int:
    """Return bytes per token with PEFT's forward: each layer's float32 input, dropout mask, and product with A."""
    mask = 1 if settings.dropout else 0
    return sum((4 + mask) * inputs + 4 * settings.r for inputs, _ in target_shapes(settings, base).values())


def _recomputed(settings: TrainSettings, base: Base, tokens: int) -> int:
    """Return the bytes of activations with checkpointing: each layer's input, and all of one layer's."""
    between = tokens * base.dtype.itemsize * _width(base) * _layers(base)
    return between + _activations(settings, base, tokens) // _layers(base)


def _width(base: Base) -> int:
    return int(base.model.config.hidden_size)


def _layers(base: Base) -> int:
    return int(base.model.config.num_hidden_layers)


def _largest_layer(base: Base) -> int:
    """Return the bytes of the largest layer's weights, which are dequantised while it runs."""
    return base.dtype.itemsize * max(inputs * outputs for inputs, outputs in base.layout.linears.values())


def _unpacked(base: Base) -> int:
    """Return the bytes of all 4-bit layers' weights, dequantised; 0 except on CPUs, where dequantising is slow."""
    if base.device.type != "cpu":
        return 0
    layers = (base.model.get_submodule(name) for name in base.layout.linears)
    sizes = (base.layout.linears[name] for name in base.layout.linears)
    return base.dtype.itemsize * sum(
        inputs * outputs
        for layer, (inputs, outputs) in zip(layers, sizes, strict=True)
        if isinstance(layer, Linear4bit)
    )


def _logits(base: Base, trained: int) -> int:
    """Return the bytes of the logits in the base's dtype and in float32, their softmax, and the gradients of both."""
    return trained * int(base.model.config.vocab_size) * (2 * base.dtype.itemsize + 3 * 4)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
