"""Paged attention by torch: gathers each sequence's blocks and attends over them, padded, with a mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from server.compute.attention import AttentionParams, PagedAttention, cache_indices, paged_chunks
from server.compute.transfer import to_device
from server.engine.sequence import Batch, Chunk


class TorchKvCache:
    """See :class:`server.compute.backend.KvCache`.

    Blocks hold zeros until they are written, and :meth:`clear` zeroes a block before another sequence gets it:
    attention reads whole blocks and masks the positions that a row must not see, but a mask does not stop a NaN.
    """

    def __init__(
        self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.size = size
        self.device = device
        self.dtype = dtype
        by_shape: dict[tuple[int, int], list[int]] = {}
        for layer, shape in shapes.items():
            by_shape.setdefault(shape, []).append(layer)
        self._storage = [self._zeros(len(layers), blocks, *shape) for shape, layers in by_shape.items()]
        self.layers: Mapping[int, tuple[Tensor, Tensor]] = {
            layer: (storage[i, 0], storage[i, 1])
            for storage, layers in zip(self._storage, by_shape.values(), strict=True)
            for i, layer in enumerate(layers)
        }
        """Layer -> keys and values, each [blocks, size, KVH, D]."""

    def _zeros(self, layers: int, blocks: int, heads: int, width: int) -> Tensor:
        """[layers, 2, blocks, size, heads, width]."""
        return torch.zeros(layers, 2, blocks, self.size, heads, width, device=self.device, dtype=self.dtype)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero ``blocks`` in all layers."""
        numbers = to_device(blocks, self.device)
        for storage in self._storage:
            storage.index_fill_(2, numbers, 0)

    def attention(self, batch: Batch) -> PagedAttention:
        """Attention over the blocks of ``batch``."""
        return TorchAttention(batch, self)


@dataclass(eq=False)
class DecodeGroup:
    """Rows of one token each, with contexts of similar length: attended in one call."""

    rows: Tensor | slice
    block_table: Tensor
    """[rows, blocks], padded with each sequence's first block (masked)."""
    positions: Tensor
    """[rows] position of each row's token."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Window -> [rows, 1, 1, positions], added to the scores; made once a step, used by every layer."""


@dataclass(eq=False)
class PrefillChunk:
    """One chunk of several tokens."""

    rows: slice
    blocks: Tensor
    """[blocks] of its sequence up to the chunk's end."""
    start: int
    """Position of its first token."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Window -> [query heads of a group * length, positions]."""


class TorchAttention:
    """Attention of one step. See :class:`server.compute.attention.PagedAttention`."""

    def __init__(self, batch: Batch, cache: TorchKvCache) -> None:
        self.batch = batch
        self.cache = cache
        self.device = cache.device

    @cached_property
    def cache_index(self) -> tuple[Tensor, Tensor]:
        """Where each row's keys and values are written: [T] block, and [T] offset in the block."""
        indices = to_device(cache_indices(self.batch, self.cache.size), self.device)
        return indices // self.cache.size, indices % self.cache.size

    @cached_property
    def decode_groups(self) -> list[DecodeGroup]:
        """Chunks of one token, grouped by context length so that little of a padded product is padding."""
        chunks = [chunk for chunk in self.batch.chunks if chunk.length == 1]
        return [self._decode_group(rows) for rows in group_by_length(chunks, self.cache.size)]

    @cached_property
    def prefill_chunks(self) -> list[PrefillChunk]:
        """Longer chunks, each attended by itself."""
        return [
            PrefillChunk(
                slice(chunk.first_row, chunk.first_row + chunk.rows), to_device(chunk.blocks, self.device), chunk.start
            )
            for chunk in paged_chunks(self.batch, self.cache.size)
            if chunk.rows > 1
        ]

    def _decode_group(self, rows: list[int]) -> DecodeGroup:
        chunks = [self.batch.chunks[row] for row in rows]
        counts = [chunk.start // self.cache.size + 1 for chunk in chunks]
        widest = max(counts)
        table = [
            chunk.sequence.blocks[:count] + chunk.sequence.blocks[:1] * (widest - count)
            for chunk, count in zip(chunks, counts, strict=True)
        ]
        consecutive = rows == list(range(len(rows)))
        return DecodeGroup(
            slice(0, len(rows)) if consecutive else to_device(rows, self.device),
            to_device(table, self.device),
            to_device([chunk.start for chunk in chunks], self.device),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Write keys and values, then attend: q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""
        keys, values = self.cache.layers[layer]
        keys[self.cache_index], values[self.cache_index] = k, v
        out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        for group in self.decode_groups:
            out[group.rows] = self._attend_decode(group, q[group.rows], keys, values, params)
        for chunk in self.prefill_chunks:
            out[chunk.rows] = self._attend_prefill(chunk, q[chunk.rows], keys, values, params)
        return out

    def _attend_decode(
        self, group: DecodeGroup, q: Tensor, keys: Tensor, values: Tensor, params: AttentionParams
    ) -> Tensor:
        rows, positions = len(q), group.block_table.shape[1] * self.cache.size
        k, v = (
            t.index_select(0, group.block_table.view(-1)).view(rows, positions, *t.shape[2:]).transpose(1, 2)
            for t in (keys, values)
        )
        if params.window not in group.masks:
            mask = self._mask(group.positions.unsqueeze(1), positions, params.window)
            group.masks[params.window] = mask.view(rows, 1, 1, positions)
        grouped = q.reshape(rows, k.shape[1], -1, q.shape[-1])
        return attend(grouped, k, v, group.masks[params.window], params).reshape(q.shape)

    def _attend_prefill(
        self, chunk: PrefillChunk, q: Tensor, keys: Tensor, values: Tensor, params: AttentionParams
    ) -> Tensor:
        length, positions = len(q), len(chunk.blocks) * self.cache.size
        k, v = (
            t.index_select(0, chunk.blocks).view(1, positions, *t.shape[2:]).transpose(1, 2) for t in (keys, values)
        )
        group_heads = q.shape[1] // k.shape[1]
        if params.window not in chunk.masks:
            rows = torch.arange(chunk.start, chunk.start + length, device=self.device).unsqueeze(1)
            chunk.masks[params.window] = self._mask(rows, positions, params.window).repeat(group_heads, 1)
        folded = q.transpose(0, 1).reshape(1, k.shape[1], group_heads * length, q.shape[-1])
        out = attend(folded, k, v, chunk.masks[params.window], params)
        return out.view(q.shape[1], length, q.shape[-1]).transpose(0, 1)

    def _mask(self, rows: Tensor, positions: int, window: int | None) -> Tensor:
        """Causal mask [rows, positions] to add to the scores of queries at positions ``rows`` [rows, 1]: 0 or -inf."""
        columns = torch.arange(positions, device=self.device)
        visible = columns <= rows
        if window is not None:
            visible &= columns > rows - window
        return torch.zeros(visible.shape, device=self.device, dtype=self.cache.dtype).masked_fill_(~visible, -torch.inf)


def group_by_length(chunks: Sequence[Chunk], size: int) -> list[list[int]]:
    """Indices of single-token ``chunks``, grouped so that block counts in a group differ by less than a factor of 2."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(chunks)), key=lambda r: -chunks[r].start):
        blocks = chunks[row].start // size + 1
        if not groups or 2 * blocks <= longest:
            groups.append([])
            longest = blocks
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, params: AttentionParams) -> Tensor:
    """Attention of q [B, KVH, G, D] over k, v [B, KVH, L, D] with ``mask`` added, broadcast to [B, KVH, G, L].

    G holds the query heads that share a key, and the rows of a chunk: every key is read once for all of them.
    """
    if params.softcap is not None:
        return attend_reference(q, k, v, mask, params)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=params.scale)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, params: AttentionParams) -> Tensor:
    """Attention by its definition, in float32. Also for models with a softcap, which torch's fused attention lacks."""
    scores = q.float() @ k.float().transpose(-1, -2) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    return ((scores + mask).softmax(-1) @ v.float()).to(q.dtype)
