"""All layers of a model in one native call, where the CPU kernels allow it.

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
from torch.nn import functional as F

from server.compute.backend import ServedModel
from server.compute.cpu import architectures
from server.compute.cpu.architectures import ONE_KIND, Architecture, NormWeights
from server.compute.cpu.attention import KernelAttention, KernelKvCache, padded_width
from server.compute.cpu.kernels import Kernels, pad_rows, padded_input
from server.compute.cpu.linear import FusedNf4
from server.compute.cpu.lora import KernelLora, lora_rows
from server.compute.cpu.structures import (
    ATTENTION_MAX_WIDTH,
    ATTENTION_SCRATCH,
    HEAD_MIN_TOKENS,
    LORA_MAX_INPUTS,
    MEMBERS,
    NF4_BLOCK,
    NF4_BORDER,
    NF4_SCRATCH,
    SUMMED,
    TILE_INPUTS,
    TILE_ROWS,
    VECTOR,
    Layer,
    Linear,
    Lora,
    Model,
    Nf4,
    Norm,
    Step,
    Workspace,
    address,
)
from server.compute.layers import LinearGroup
from server.compute.lora_mapping import make_mapping
from server.compute.model_inputs import ForwardOutput, make_inputs
from server.engine.sequence import Batch
from server.engine.slots import PAGE

ONE_BY_ONE = (
    "This model's layers are computed one by one, by transformers' modules instead of one native call, so every "
    "request takes several times as long"
)

log = logging.getLogger(__name__)


class Decoder:
    """A model's layers as ``decoder.c`` takes them."""

    batch_invariant = True

    def __init__(self, model: ServedModel, kernels: Kernels) -> None:
        """The caller has checked that all of it fits (:meth:`of`)."""
        assert isinstance(model.kv, KernelKvCache)
        causal: Any = model.base.model
        self.kernels, self.pool, self.kv, self.params = kernels, model.pool, model.kv, model.attention
        self.model, self.embed = causal.base_model, causal.get_input_embeddings()
        self.architecture = Architecture.of(causal)
        groups = {group.names[0]: group for group in model.pool.groups}
        self.groups = [
            [groups[names[0]] for names in self.architecture.group_names(i)] for i in range(len(self.model.layers))
        ]
        self.seconds: Tensor | None = None
        """[len(PHASES)] float64, where set: steps add what their phases took."""
        self.norms = [self.architecture.norms(layer) for layer in self.model.layers]
        self.final_norm = self.architecture.final_norm(self.model)
        self.layers = (Layer * len(self.groups))(*(self._layer(i) for i in range(len(self.groups))))
        self._generation = self.pool.generation
        *_, self.kv_heads, self.width = self.kv.layers[0][0].shape
        self.heads, self.cached_width = causal.config.num_attention_heads, padded_width(self.width)
        self.hidden, self.intermediate = (self.groups[0][i].shape.inputs for i in (0, 3))
        self.bases = {name: getattr(self.layers[0], name).base for name, _ in self.architecture.groups}
        """Of the first layer, whose shapes are those of all."""
        self.head = causal.get_output_embeddings()
        self.vocabulary = self.head.weight.shape[0]
        self.rotary_width, self.cosine, self.sine = angles(causal, model.base.max_model_len)
        self.native = self._native()
        self.active = lru_cache(maxsize=64)(self._active)

    @classmethod
    def of(cls, model: ServedModel, kernels: Kernels | None) -> Self | None:
        """The model's decoder, or None where its layers, their shapes or this machine are not what the kernels take."""
        if kernels is None:
            return None
        reason = unsupported_reason(model)
        if reason is None:
            return cls(model, kernels)
        log.warning("%s: %s.", ONE_BY_ONE, reason)
        return None

    def _native(self) -> Model:
        architecture, family = self.architecture, self.architecture.family
        one, all_heads = self.width, self.heads * self.width
        return Model(
            layers=len(self.groups),
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            width=self.width,
            cached_width=self.cached_width,
            size=self.kv.size,
            vocabulary=self.vocabulary,
            stride=self.bases["qkv"].stride,
            head_stride=3 * one if family.heads_in_turn else one,
            keys=one if family.heads_in_turn else all_heads,
            values=2 * one if family.heads_in_turn else all_heads + self.kv_heads * one,
            rotary_width=self.rotary_width,
            activation=architecture.activation,
            gated=family.gated,
            norm_rounds=family.norm_rounds,
            rotary_pairs=family.rotary_pairs,
            rotary_rounds=family.rotary_rounds,
            norms_all_heads=family.norms_all_heads,
            norm_centers=family.norm_centers,
            residual=architecture.residual,
            eps=architecture.eps,
            norm_offset=family.norm_offset,
            residual_multiplier=architecture.multipliers.residual,
            logits_divisor=architecture.multipliers.logits_divisor,
            final_softcap=architecture.final_softcap,
            layer=ctypes.addressof(self.layers),
            final_norm=Norm(*map(address, self.final_norm)),
            head=address(self.head.weight),
            head_bias=address(self.head.bias),
        )

    def _layer(self, index: int) -> Layer:
        keys, values = self.kv.layers[index]
        params, kind = self.params[index], self.architecture.rotary[index]
        linears = {
            name: Linear(_base(group), _lora(group))
            for (name, _), group in zip(self.architecture.groups, self.groups[index], strict=True)
        }
        return Layer(
            *(Norm(*map(address, norm)) for norm in self.norms[index]),
            keys=address(keys),
            values=address(values),
            window=params.window or 0,
            rotary=-1 if kind is None else self.architecture.rotary_kinds.index(kind),
            scale=params.scale,
            softcap=params.softcap or 0.0,
            **linears,
        )

    def _refresh(self) -> None:
        """Take over where the pool's tensors are."""
        self._generation = self.pool.generation
        for layer, groups in zip(self.layers, self.groups, strict=True):
            for (name, _), group in zip(self.architecture.groups, groups, strict=True):
                getattr(layer, name).lora = _lora(group)

    def __call__(self, batch: Batch) -> ForwardOutput:
        """Run a step."""
        if self._generation != self.pool.generation:
            self._refresh()
        tokens, positions, keep, hidden_rows = make_inputs(batch)
        x = self.embed(torch.tensor(tokens)) * self.architecture.multipliers.embedding
        at = torch.tensor(positions)
        cosine, sine = self.cosine[:, at], self.sine[:, at]
        logits = torch.empty(len(keep), self.vocabulary)
        hidden = torch.empty(len(hidden_rows), self.hidden, dtype=torch.bfloat16)
        mapping, paged = make_mapping(batch, self.pool.resident), KernelAttention(batch, self.kv)
        kept, read = torch.tensor(keep), torch.tensor(hidden_rows)
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
            *(len(hidden_rows), address(read), address(hidden)),
        )
        threads = torch.get_num_threads()
        work, room = self._work(x, 0 if lora is None else lora.pages, paged.chunks.context, threads)
        self.kernels.decode_step(self.native, step, work, threads)
        del room  # until here the kernels wrote to it
        return ForwardOutput(logits, hidden.float() if hidden_rows else None)

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
        rows, padded = len(x), pad_rows(len(x))
        queries, bases = self.heads * self.cached_width, self.bases
        summed = self.architecture.residual == SUMMED
        room = [
            _room(padded * self.hidden),
            padded_input(rows, self.hidden, bases["qkv"].stride),
            _room(padded * max(bases["qkv"].out, bases["gate_up"].out) + 2 * VECTOR),
            self._query_room(padded),
            _room(padded * queries),
            padded_input(rows, self.intermediate, bases["down"].stride),
            _room(padded * self.hidden),
            _room(padded * self.hidden if summed else 0),
            _room(pages * MEMBERS * TILE_ROWS * PAGE),
            torch.empty(padded, self.hidden + -self.hidden % TILE_INPUTS, dtype=torch.int32),
            torch.empty(threads * max(base.blocks for base in bases.values()) * NF4_BLOCK * NF4_SCRATCH),
            torch.empty(threads * context * ATTENTION_SCRATCH),
        ]
        room[0][: x.numel()] = x.reshape(-1)
        return Workspace(*(address(tensor) for tensor in room)), room

    def _query_room(self, padded: int) -> Tensor:
        """For queries, and then for the input of the next layer. Zeros are before it, if that is padded at all."""
        queries, base = self.heads * self.cached_width, self.bases["o"]
        if queries == base.inputs == base.stride:
            return _room(padded * queries)
        return torch.zeros(NF4_BORDER + padded * max(queries, base.stride), dtype=torch.bfloat16)[NF4_BORDER:]


def angles(causal: Any, positions: int) -> tuple[int, Tensor, Tensor]:
    """How many components of a head are rotated, and cosine and sine of every position, by the model's own module.

    They are [kinds, positions, components / 2 padded to whole vectors] float32. The module returns each twice, for the
    two halves of what is rotated.
    """
    like, architecture = causal.get_input_embeddings().weight, Architecture.of(causal)
    at = torch.arange(positions).unsqueeze(0)
    arguments = [() if kind == ONE_KIND else (kind,) for kind in architecture.rotary_kinds or [ONE_KIND]]
    made = [causal.base_model.rotary_emb(like, at, *kind) for kind in arguments]
    width = made[0][0].shape[-1]
    half = width // 2
    once = slice(None, None, 2) if architecture.family.angles_in_pairs else slice(half)
    halves = (torch.stack([both[i][0, :, once].float() for both in made]) for i in (0, 1))
    cosine, sine = (F.pad(half_of, (0, -half % VECTOR)) for half_of in halves)
    return width, cosine.contiguous(), sine.contiguous()


def unsupported_reason(model: ServedModel) -> str | None:
    """Why the kernels cannot compute this model's layers; None if they can."""
    causal: Any = model.base.model
    if reason := architectures.unsupported_reason(causal, model.base.max_model_len):
        return reason
    if model.base.dtype != torch.bfloat16:
        return "the kernels compute in bf16 only"
    if not isinstance(model.kv, KernelKvCache):
        return f"the kernels take --block-size a multiple of 16 and heads up to {ATTENTION_MAX_WIDTH} wide"
    architecture = Architecture.of(causal)
    if not _plain(causal.get_output_embeddings()) or any(
        part.dtype != torch.bfloat16 for norm in _norms(causal, architecture) for part in norm if part is not None
    ):
        return f"its norms are not bf16, or its output layer is not, or has less than {HEAD_MIN_TOKENS} tokens"
    groups = {group.names[0]: group for group in model.pool.groups}
    for layer in range(causal.config.num_hidden_layers):
        for names in architecture.group_names(layer):
            if names[0] not in groups or groups[names[0]].names != names:
                return f"{' and '.join(names)} do not have the same input"
            if reason := _linear_reason(groups[names[0]]):
                return reason
    return None


def _linear_reason(group: LinearGroup) -> str | None:
    """Why the kernels cannot compute these linear layers."""
    base: object = group.base
    if not isinstance(base, FusedNf4) or base.kernels is None:
        return f"{group.names[0]} is not NF4 in blocks of {NF4_BLOCK}"
    if base.native.stride > LORA_MAX_INPUTS or not isinstance(group.lora, KernelLora):
        return f"{group.names[0]} has {group.shape.inputs} inputs, and the kernels take up to {LORA_MAX_INPUTS}, padded"
    return None


def _plain(head: nn.Module) -> bool:
    if type(head) is not nn.Linear:
        return False
    bf16 = all(parameter.dtype == torch.bfloat16 for parameter in head.parameters())
    return bf16 and head.weight.is_contiguous() and head.weight.shape[0] >= HEAD_MIN_TOKENS


def _norms(causal: Any, architecture: Architecture) -> Iterator[NormWeights]:
    yield architecture.final_norm(causal.base_model)
    for layer in causal.base_model.layers:
        yield from architecture.norms(layer)


def _base(group: LinearGroup) -> Nf4:
    base: object = group.base
    assert isinstance(base, FusedNf4)
    return base.native


def _lora(group: LinearGroup) -> Lora:
    assert isinstance(group.lora, KernelLora)
    return group.lora.native


def _room(numbers: int) -> Tensor:
    return torch.empty(numbers, dtype=torch.bfloat16)
