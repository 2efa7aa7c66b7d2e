"""Replaces the forward of PEFT's plain LoRA layers by :mod:`training.model.linear_group`."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from torch.nn import functional as F

from bases.architecture import SIBLINGS
from bases.nf4 import Linear4bit, functional
from training.model.dropout import Dropout
from training.model.linear_group import AdaptedLinear, LinearGroup, Weight

ADAPTER = "default"
"""PEFT's name of the one adapter."""


@contextmanager
def patch_lora_layers(model: PeftModel, *, unpack: bool) -> Iterator[list[str]]:
    """Patch the forward of the model's linear layers; yield the names of adapted layers that keep PEFT's forward.

    Those are DoRA layers, embeddings, and layers that are not plainly linear. With ``unpack`` the weights of 4-bit
    layers are dequantised once and kept, else at each use; the values are the same. On exit, the patches are removed.
    """
    patched: list[nn.Module] = []
    unpatched: list[str] = []
    groups: dict[str, list[Any]] = defaultdict(list)
    try:
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                if _plain(module):
                    groups[group_name(name)].append(module)
                else:
                    unpatched.append(name)
            elif unpack and type(module) is Linear4bit and not name.endswith(".base_layer"):
                _replace(module, partial(_frozen, base_weight(module, keep=True), module), patched)
        for layers in groups.values():
            siblings = LinearGroup([_adapted(layer, unpack) for layer in layers], _dropout(layers[0]))
            for number, layer in enumerate(layers):
                _replace(layer, siblings.forward_of(number), patched)
        yield unpatched
    finally:
        for module in patched:
            del module.forward


def group_name(name: str) -> str:
    """Return the name of the group of layers that ``name`` shares its input with."""
    parent, _, leaf = name.rpartition(".")
    together = next((names for names in SIBLINGS if leaf in names), (leaf,))
    return ".".join((parent, *together))


def base_weight(layer: Any, *, keep: bool) -> Weight:
    """Return a function that gives a base layer's weight, dequantised from 4 bits once if ``keep``, else per call."""
    if not isinstance(layer, Linear4bit):
        return lambda: layer.weight
    if not keep:
        return lambda: _unpacked(layer)
    weight = _unpacked(layer)
    return lambda: weight


def _unpacked(layer: Any) -> Tensor:
    state = layer.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "this base has served: its weights are repacked"
    weight: Tensor = functional.dequantize_4bit(layer.weight.data, state)
    return weight.to(layer.compute_dtype)


def _replace(module: nn.Module, forward: Any, patched: list[nn.Module]) -> None:
    """Shadow the class's ``forward`` with an attribute of the object."""
    module.forward = forward
    patched.append(module)


def _frozen(weight: Weight, layer: Any, x: Tensor) -> Tensor:
    """Run the forward of a layer without an adapter; ``x`` may have any dtype, as in bitsandbytes."""
    unpacked = weight()
    bias = None if layer.bias is None else layer.bias.to(unpacked.dtype)
    return F.linear(x.to(unpacked.dtype), unpacked, bias).to(x.dtype)


def _plain(layer: Any) -> bool:
    """Return whether it is a linear layer with one adapter of a form that LinearGroup can compute."""
    return (
        type(layer) in (PeftLinear, PeftLinear4bit)
        and type(layer.base_layer) in (nn.Linear, Linear4bit)
        and list(layer.lora_A) == layer.active_adapters == [ADAPTER]
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], Dropout | nn.Identity)
    )


def _adapted(layer: Any, unpack: bool) -> AdaptedLinear:
    base = layer.base_layer
    weight = base_weight(base, keep=unpack)
    bias = None if base.bias is None else base.bias.data.to(_dtype(base))
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return AdaptedLinear(layer, weight, _dtype(base), bias, down, up, layer.scaling[ADAPTER])


def _dtype(layer: Any) -> torch.dtype:
    dtype: torch.dtype = layer.compute_dtype if isinstance(layer, Linear4bit) else layer.weight.dtype
    return dtype


def _dropout(layer: Any) -> float:
    return float(getattr(layer.lora_dropout[ADAPTER], "p", 0.0))
