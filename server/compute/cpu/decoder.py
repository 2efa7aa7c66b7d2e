"""All layers of a Llama-shaped model in one native call, where the CPU kernels allow it.

transformers' model stays what it is and is the reference: :meth:`Decoder.of` takes a model only if every part is one
that ``decoder.c`` computes, and the same tensors serve both (their addresses are taken once: no parameter may be
replaced afterwards). A step through the model's own modules is some 2,000 calls from Python; at a few rows they take
longer than the arithmetic.
"""

import ctypes
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from server.compute.backend import ServedModel
from server.compute.cpu.attention import KernelAttention, KernelKvCache
from server.compute.cpu.kernels import Kernels, pad_rows
from server.compute.cpu.linear import FusedNf4
from server.compute.cpu.lora import KernelLora, lora_rows
from server.compute.cpu.structures import (
    ATTENTION_SCRATCH,
    HEAD_MIN_TOKENS,
    MEMBERS,
    NF4_SCRATCH,
    TILE_ROWS,
    Layer,
    Linear,
    Lora,
    Model,
    Nf4,
    Step,
    Workspace,
    address,
)
from server.compute.layers import LinearGroup
from server.compute.llama import is_llama_shaped
from server.compute.lora_mapping import make_mapping
from server.compute.model_inputs import make_inputs
from server.engine.sequence import Batch
from server.engine.slots import PAGE

STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles depend on nothing but the position."""
GROUPS = (
    ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("o", ("self_attn.o_proj",)),
    ("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    ("down", ("mlp.down_proj",)),
)

log = logging.getLogger(__name__)


class Decoder:
    """A model's layers as ``decoder.c`` takes them."""

    def __init__(self, model: ServedModel, kernels: Kernels) -> None:
        """The caller has checked that all of it fits (:meth:`of`)."""
        assert isinstance(model.kv, KernelKvCache)
        causal: Any = model.base.model
        self.kernels, self.pool, self.kv, self.params = kernels, model.pool, model.kv, model.attention
        self.model = causal.model
        groups = _groups(model)
        self.groups = [[groups[name] for name, _ in _named_groups(i)] for i in range(len(self.model.layers))]
        self.seconds: Tensor | None = None
        """[len(PHASES)] float64, where set: steps add what their phases took."""
        self.layers = (Layer * len(self.groups))(*(self._layer(i) for i in range(len(self.groups))))
        self._generation = self.pool.generation
        config, attention = causal.config, self.model.layers[0].self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.hidden, self.intermediate, self.width = config.hidden_size, config.intermediate_size, attention.head_dim
        self.vocabulary = causal.lm_head.weight.shape[0]
        self.native = Model(
            *(len(self.groups), self.hidden, self.intermediate, self.heads, self.kv_heads, self.width, self.kv.size),
            *(self.vocabulary, config.rms_norm_eps),
            *(ctypes.addressof(self.layers), address(self.model.norm.weight), address(causal.lm_head.weight)),
        )
        self.cosine, self.sine = self._angles(model.base.max_model_len)
        self.active = lru_cache(maxsize=64)(self._active)

    @classmethod
    def of(cls, model: ServedModel, kernels: Kernels | None) -> Self | None:
        """The model's decoder, or None where its layers, their shapes or this machine are not what the kernels take."""
        if kernels is None:
            return None
        reason = unsupported_reason(model)
        if reason is None:
            return cls(model, kernels)
        log.warning("Layers are computed one by one, which is several times slower: %s.", reason)
        return None

    def _layer(self, index: int) -> Layer:
        module = self.model.layers[index]
        attention = module.self_attn
        keys, values = self.kv.layers[index]
        params = self.params[index]
        linears = {
            name: Linear(_base(group), _lora(group))
            for (name, _), group in zip(GROUPS, self.groups[index], strict=True)
        }
        return Layer(
            input_norm=address(module.input_layernorm.weight),
            post_norm=address(module.post_attention_layernorm.weight),
            q_norm=address(_weight(attention, "q_norm")),
            k_norm=address(_weight(attention, "k_norm")),
            keys=address(keys),
            values=address(values),
            window=params.window or 0,
            scale=params.scale,
            **linears,
        )

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, [positions, width] bf16 each, as the model's own module makes them."""
        like = self.model.embed_tokens.weight
        cosine, sine = self.model.rotary_emb(like, torch.arange(positions).unsqueeze(0))
        return cosine[0].contiguous(), sine[0].contiguous()

    def _refresh(self) -> None:
        """Take over where the pool's tensors are."""
        self._generation = self.pool.generation
        for layer, groups in zip(self.layers, self.groups, strict=True):
            for (name, _), group in zip(GROUPS, groups, strict=True):
                getattr(layer, name).lora = _lora(group)

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [len(batch.sampled), vocabulary] float32 after writing the keys and values of all rows."""
        if self._generation != self.pool.generation:
            self._refresh()
        tokens, positions, keep = make_inputs(batch)
        x = self.model.embed_tokens(torch.tensor(tokens))
        at = torch.tensor(positions)
        cosine, sine = self.cosine[at], self.sine[at]
        logits = torch.empty(len(keep), self.vocabulary)
        mapping, paged, kept = (
            make_mapping(batch, self.pool.resident),
            KernelAttention(batch, self.kv),
            torch.tensor(keep),
        )
        lora = lora_rows(mapping) if mapping.segments else None
        step = Step(
            *(len(tokens), len(paged.chunks.table), len(keep), paged.chunks.context),
            *(address(t) for t in (paged.chunks.table, paged.chunks.blocks, paged.slots, cosine, sine)),
            *(
                lora.address if lora else None,
                self.active(mapping.targets).ctypes.data,
                address(kept),
                address(logits),
                address(self.seconds),
            ),
        )
        threads = torch.get_num_threads()
        work, room = self._work(x, 0 if lora is None else lora.pages, paged.chunks.context, threads)
        self.kernels.decode_step(self.native, step, work, threads)
        del room  # until here the kernels wrote to it
        return logits

    def _active(self, targets: frozenset[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """[layers, 4]: bit j where the group's j-th layer is among ``targets``."""
        return np.array(
            [
                [sum(1 << j for j, name in enumerate(g.names) if name in targets) for g in groups]
                for groups in self.groups
            ],
            dtype=np.uint8,
        )

    def _work(self, x: Tensor, pages: int, context: int, threads: int) -> tuple[Workspace, list[Tensor]]:
        """Room for a step, and what must stay alive for it: ``x`` [rows, hidden], padded, comes first."""
        padded = pad_rows(len(x))
        queries = self.heads * self.width
        wide = max(queries + 2 * self.kv_heads * self.width, 2 * self.intermediate)
        widths = (self.hidden, self.hidden, wide, queries, queries, self.intermediate, self.hidden)
        room = [torch.empty(padded, width, dtype=torch.bfloat16) for width in widths]
        room[0][: len(x)] = x
        room.append(torch.empty(pages * MEMBERS * TILE_ROWS * PAGE, dtype=torch.bfloat16))
        room.append(torch.empty(padded, self.hidden, dtype=torch.int32))
        room.append(torch.empty(threads * max(self.hidden, self.intermediate, queries) * NF4_SCRATCH))
        room.append(torch.empty(threads * context * ATTENTION_SCRATCH))
        return Workspace(*(address(tensor) for tensor in room)), room


def _named_groups(layer: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The first name and all names of each group of a layer."""
    for _, leaves in GROUPS:
        names = tuple(f"model.layers.{layer}.{leaf}" for leaf in leaves)
        yield names[0], names


def _groups(model: ServedModel) -> dict[str, LinearGroup]:
    """Groups by the name of their first layer."""
    return {group.names[0]: group for group in model.pool.groups}


def unsupported_reason(model: ServedModel) -> str | None:
    """Why the kernels cannot compute this model's layers; None if they can."""
    causal: Any = model.base.model
    if not is_llama_shaped(causal):
        return f"not the layers of {type(causal).__name__}"
    softcaps = any(params.softcap for params in model.attention.values())
    if causal.config.rope_parameters["rope_type"] not in STATIC or softcaps:
        return "its positions or its attention are of an unusual kind"
    if not isinstance(model.kv, KernelKvCache):
        return "its attention takes --block-size a multiple of 16, heads a multiple of 32 wide, and bf16"
    if not _plain(causal.lm_head) or any(weight.dtype != torch.bfloat16 for weight in _norms(causal.model)):
        return "its output layer or its norms are not plain bf16"
    groups = _groups(model)
    wanted = (names for i in range(len(causal.model.layers)) for names in _named_groups(i))
    if not all(first in groups and groups[first].names == names and _fused(groups[first]) for first, names in wanted):
        return "its linear layers are not NF4 in blocks of 64, or of a shape that the kernels do not take"
    return None


def _plain(head: nn.Module) -> bool:
    if type(head) is not nn.Linear or _bias(head) is not None:
        return False
    return (
        head.weight.is_contiguous() and head.weight.dtype == torch.bfloat16 and head.weight.shape[0] >= HEAD_MIN_TOKENS
    )


def _norms(model: Any) -> Iterator[Tensor]:
    yield model.norm.weight
    for layer in model.layers:
        yield from (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        found = (_weight(layer.self_attn, name) for name in ("q_norm", "k_norm"))
        yield from (weight for weight in found if weight is not None)


def _fused(group: LinearGroup) -> bool:
    base: object = group.base
    return isinstance(group.lora, KernelLora) and isinstance(base, FusedNf4) and base.kernels is not None


def _base(group: LinearGroup) -> Nf4:
    base: object = group.base
    assert isinstance(base, FusedNf4)
    return base.native


def _lora(group: LinearGroup) -> Lora:
    assert isinstance(group.lora, KernelLora)
    return group.lora.native


def _bias(layer: nn.Linear) -> Tensor | None:
    return layer.bias


def _weight(module: nn.Module, name: str) -> Tensor | None:
    return getattr(getattr(module, name, None), "weight", None)
