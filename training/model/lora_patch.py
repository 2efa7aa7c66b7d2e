"""Replace the forward of PEFT's plain LoRA layers by :mod:`training.model.linear_group`; leave the others to PEFT."""

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

from bases.nf4 import Linear4bit, functional
from training.model.dropout import Dropout
from training.model.linear_group import AdaptedLinear, LinearGroup, Weight

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that transformers' models call with the same input; where they do not, they are computed for
nothing once, but never wrongly."""
ADAPTER = "default"
"""PEFT's name of the one adapter."""


@contextmanager
def patch_lora_layers(model: PeftModel, *, unpack: bool) -> Iterator[list[str]]:
    """Compute the model's linear layers here while it lasts; gives the adapted layers that are PEFT's to compute.

    Those are of an unusual form: DoRA, embeddings, layers that are not plainly linear. With ``unpack`` the weights of
    4-bit layers are dequantised once and kept, to the same values; without it at each product.
    """
    taken: list[nn.Module] = []
    left: list[str] = []
    groups: dict[str, list[Any]] = defaultdict(list)
    try:
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                if _plain(module):
                    groups[group_name(name)].append(module)
                else:
                    left.append(name)
            elif unpack and type(module) is Linear4bit and not name.endswith(".base_layer"):
                _replace(module, partial(_frozen, base_weight(module, keep=True), module), taken)
        for layers in groups.values():
            siblings = LinearGroup([_adapted(layer, unpack) for layer in layers], _dropout(layers[0]))
            for number, layer in enumerate(layers):
                _replace(layer, siblings.forward_of(number), taken)
        yield left
    finally:
        for module in taken:
            del module.forward


def group_name(name: str) -> str:
    """The same for layers of a name that share their input."""
    parent, _, leaf = name.rpartition(".")
    together = next((names for names in SIBLINGS if leaf in names), (leaf,))
    return ".".join((parent, *together))


def base_weight(layer: Any, *, keep: bool) -> Weight:
    """Of one of the base's linear layers, 4-bit or not. Unpacked weights are kept, or unpacked at each call."""
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


def _replace(module: nn.Module, forward: Any, taken: list[nn.Module]) -> None:
    """By an attribute of the object, in front of the method of its class."""
    module.forward = forward
    taken.append(module)


def _frozen(weight: Weight, layer: Any, x: Tensor) -> Tensor:
    """A layer without an adapter; ``x`` in any dtype, as bitsandbytes takes it."""
    unpacked = weight()
    bias = None if layer.bias is None else layer.bias.to(unpacked.dtype)
    return F.linear(x.to(unpacked.dtype), unpacked, bias).to(x.dtype)


def _plain(layer: Any) -> bool:
    """Whether it is a linear layer with one adapter of the form that LinearGroup compute."""
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
