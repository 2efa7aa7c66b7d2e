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
from server.compute.cpu.architectures import ONE_KIND, Architecture, norm_weight
from server.compute.cpu.attention import KernelAttention, KernelKvCache, padded_width
from server.compute.cpu.kernels import Kernels, pad_rows
from server.compute.cpu.linear import FusedNf4
from server.compute.cpu.lora import KernelLora, lora_rows
from server.compute.cpu.structures import (
    ATTENTION_MAX_WIDTH,
    ATTENTION_SCRATCH,
    HEAD_MIN_TOKENS,
    LORA_MAX_INPUTS,
    MEMBERS,
    NF4_BLOCK,
    NF4_OUTPUTS,
    NF4_SCRATCH,
    TILE_ROWS,
    VECTOR,
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
        self.model = causal.model
        self.architecture = Architecture.of(causal)
        groups = {group.names[0]: group for group in model.pool.groups}
        self.groups = [
            [groups[names[0]] for names in self.architecture.group_names(i)] for i in range(len(self.model.layers))
        ]
        self.seconds: Tensor | None = None
        """[len(PHASES)] float64, where set: steps add what their phases took."""
        self.layers = (Layer * len(self.groups))(*(self._layer(i) for i in range(len(self.groups))))
        self._generation = self.pool.generation
        config, attention = causal.config, self.model.layers[0].self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.hidden, self.intermediate, self.width = config.hidden_size, config.intermediate_size, attention.head_dim
        self.cached_width = padded_width(self.width)
        self.vocabulary = causal.lm_head.weight.shape[0]
        self.rotary_width, self.cosine, self.sine = angles(causal, model.base.max_model_len)
        self.native = self._native(causal)
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

    def _native(self, causal: Any) -> Model:
        architecture, family = self.architecture, self.architecture.family
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
            rotary_width=self.rotary_width,
            activation=architecture.activation,
            gated=family.gated,
            norm_rounds=family.norm_rounds,
            rotary_pairs=family.rotary_pairs,
            rotary_rounds=family.rotary_rounds,
            norms_all_heads=family.norms_all_heads,
            eps=causal.config.rms_norm_eps,
            norm_offset=family.norm_offset,
            residual_multiplier=architecture.multipliers.residual,
            logits_divisor=architecture.multipliers.logits_divisor,
            final_softcap=architecture.final_softcap,
            layer=ctypes.addressof(self.layers),
            final_norm=address(self.model.norm.weight),
            head=address(causal.lm_head.weight),
        )

    def _layer(self, index: int) -> Layer:
        keys, values = self.kv.layers[index]
        params, kind = self.params[index], self.architecture.rotary[index]
        linears = {
            name: Linear(_base(group), _lora(group))
            for (name, _), group in zip(self.architecture.groups, self.groups[index], strict=True)
        }
        return Layer(
            *(address(weight) for weight in self.architecture.norms(self.model.layers[index])),
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
        x = self.model.embed_tokens(torch.tensor(tokens)) * self.architecture.multipliers.embedding
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
        padded = pad_rows(len(x))
        queries = self.heads * self.cached_width
        wide = max((self.heads + 2 * self.kv_heads) * self.width, 2 * self.intermediate)
        widths = (self.hidden, self.hidden, wide, queries, queries, self.intermediate, self.hidden)
        room = [torch.empty(padded, width, dtype=torch.bfloat16) for width in widths]
        room[0][: len(x)] = x
        room.append(torch.empty(pages * MEMBERS * TILE_ROWS * PAGE, dtype=torch.bfloat16))
        room.append(torch.empty(padded, self.hidden, dtype=torch.int32))
        room.append(torch.empty(threads * max(self.hidden, self.intermediate, queries) * NF4_SCRATCH))
        room.append(torch.empty(threads * context * ATTENTION_SCRATCH))
        return Workspace(*(address(tensor) for tensor in room)), room


def angles(causal: Any, positions: int) -> tuple[int, Tensor, Tensor]:
    """How many components of a head are rotated, and cosine and sine of every position, by the model's own module.

    They are [kinds, positions, components / 2 padded to whole vectors] float32. The module returns each twice, for the
    two halves of what is rotated.
    """
    like = causal.model.embed_tokens.weight
    at = torch.arange(positions).unsqueeze(0)
    arguments = [() if kind == ONE_KIND else (kind,) for kind in Architecture.of(causal).rotary_kinds or [ONE_KIND]]
    made = [causal.model.rotary_emb(like, at, *kind) for kind in arguments]
    width = made[0][0].shape[-1]
    half = width // 2
    halves = (torch.stack([both[i][0, :, :half].float() for both in made]) for i in (0, 1))
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
    width = causal.model.layers[0].self_attn.head_dim
    if norm_weight(causal.model.layers[0].self_attn, "q_norm") is not None and width % VECTOR:
        return f"its heads, {width} wide, have norms, for which the kernels take multiples of {VECTOR}"
    if not _plain(causal.lm_head) or any(weight.dtype != torch.bfloat16 for weight in _norms(causal)):
        return f"its norms are not bf16, or its output layer is not, has a bias, or less than {HEAD_MIN_TOKENS} tokens"
    groups = {group.names[0]: group for group in model.pool.groups}
    architecture = Architecture.of(causal)
    for layer in range(len(causal.model.layers)):
        for names in architecture.group_names(layer):
            if names[0] not in groups or groups[names[0]].names != names:
                return f"{' and '.join(names)} do not have the same input"
            if reason := _linear_reason(groups[names[0]]):
                return reason
    return None


def _linear_reason(group: LinearGroup) -> str | None:
    """Why the kernels cannot compute these linear layers."""
    inputs, outs = group.shape.inputs, group.shape.outs
    what = f"{group.names[0]} ({inputs} inputs, {' + '.join(map(str, outs))} outputs)"
    if inputs % NF4_BLOCK or any(out % NF4_OUTPUTS for out in outs):
        return f"{what} has a shape other than a multiple of {NF4_BLOCK} inputs and of {NF4_OUTPUTS} outputs"
    if inputs > LORA_MAX_INPUTS:
        return f"{what} has more than {LORA_MAX_INPUTS} inputs"
    fits = isinstance(group.base, FusedNf4) and group.base.kernels is not None and isinstance(group.lora, KernelLora)
    return None if fits else f"{group.names[0]} is not NF4 in blocks of {NF4_BLOCK}"


def _plain(head: nn.Module) -> bool:
    if type(head) is not nn.Linear or _bias(head) is not None:
        return False
    return (
        head.weight.is_contiguous() and head.weight.dtype == torch.bfloat16 and head.weight.shape[0] >= HEAD_MIN_TOKENS
    )


def _norms(causal: Any) -> Iterator[Tensor]:
    yield causal.model.norm.weight
    architecture = Architecture.of(causal)
    for layer in causal.model.layers:
        yield from (weight for weight in architecture.norms(layer) if weight is not None)


def _base(group: LinearGroup) -> Nf4:
    base: object = group.base
    assert isinstance(base, FusedNf4)
    return base.native


def _lora(group: LinearGroup) -> Lora:
    assert isinstance(group.lora, KernelLora)
    return group.lora.native


def _bias(layer: nn.Linear) -> Tensor | None:
    return layer.bias
