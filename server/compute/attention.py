"""Paged attention behind transformers' AttentionInterface.

:data:`IMPLEMENTATION` is registered as an attention function. Models call it with the queries, keys and values of the
new tokens, and it passes them to the object that the model's caller gave as keyword argument ``paged``: a backend's
:class:`PagedAttention`, which writes keys and values to their blocks and attends over each sequence's own, or
:class:`LayerRecorder`, which only records how each layer attends.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engine.sequence import Batch

IMPLEMENTATION = "manylora_paged"


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Attention parameters of a layer."""

    scale: float
    """Multiplies the scores."""
    window: int | None = None
    """Sliding window: positions that a query attends to, its own included. None: all up to its own."""
    softcap: float | None = None
    """Scores become ``cap * tanh(score / cap)`` (Gemma 2)."""


class PagedAttention(Protocol):
    """The attention of one step."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Write this step's keys and values, then attend: q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""


def paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function for transformers: query [1, H, T, D], key and value [1, KVH, T, D] -> [1, T, H, D].

    :mod:`bases.architecture` checks, when a base is loaded, that its attention takes no other arguments that matter.
    """
    paged: PagedAttention = kwargs["paged"]
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    params = AttentionParams(scale, kwargs.get("sliding_window"), kwargs.get("softcap"))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = paged.attend(cast("int", module.layer_idx), q, k, v, params)
    return out.unsqueeze(0), None


def register_attention() -> None:
    """Register :data:`IMPLEMENTATION` with transformers. Without a mask function: backends make their own masks."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)


@dataclass(eq=False)
class LayerRecorder:
    """Records what each layer caches and how it attends. Each token attends to itself alone."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Layer -> (KV heads, head size)."""
    params: dict[int, AttentionParams] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Record the layer; return the values, repeated over the query heads of their group."""
        self.shapes[layer] = (k.shape[1], k.shape[2])
        self.params[layer] = params
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def block_bytes(shapes: Mapping[int, tuple[int, int]], size: int, dtype: torch.dtype) -> int:
    """Bytes that one block of ``size`` tokens takes in all layers. ``shapes``: layer -> (KV heads, head size)."""
    return sum(2 * size * heads * width * dtype.itemsize for heads, width in shapes.values())


def cache_indices(batch: Batch, size: int) -> list[int]:
    """Where each row's keys and values are written: block times ``size`` plus offset in the block.

    vLLM calls it the slot mapping; a slot is an adapter's here.
    """
    return [
        chunk.sequence.blocks[position // size] * size + position % size
        for chunk in batch.chunks
        for position in range(chunk.start, chunk.end)
    ]


class PagedChunk(NamedTuple):
    """Rows of one sequence, and the KV blocks that they attend over."""

    first_row: int
    """In the batch."""
    rows: int
    start: int
    """Position of the first row in its sequence."""
    blocks: Sequence[int]
    """Of the sequence, up to the last row's."""


def paged_chunks(batch: Batch, size: int) -> Iterator[PagedChunk]:
    """The chunks of ``batch``, with their blocks of ``size`` tokens."""
    starts = accumulate((chunk.length for chunk in batch.chunks), initial=0)
    for row, chunk in zip(starts, batch.chunks, strict=False):
        yield PagedChunk(row, chunk.length, chunk.start, chunk.sequence.blocks[: (chunk.end - 1) // size + 1])
