"""Paged attention by torch: rows of one token in groups of similar length, and longer chunks, as padded products."""

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

    Blocks hold zeros until written, and :meth:`clear` zeroes a block that changes hands: attention reads whole blocks
    and masks what is not there, and a mask does not stop a NaN.
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
        """Padded products over the blocks of ``batch``."""
        return TorchAttention(batch, self)


@dataclass(eq=False)
class Singles:
    """Rows of one token each whose contexts are of similar length, attended in one call."""

    rows: Tensor | slice
    table: Tensor
    """[rows, blocks], padded with each sequence's first block (masked)."""
    last: Tensor
    """[rows] position of each row's token."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Window -> [rows, 1, 1, positions], added to the scores; made once a step, used by every layer."""


@dataclass(eq=False)
class Run:
    """One chunk of several tokens."""

    rows: slice
    blocks: Tensor
    """[blocks] of its sequence up to the chunk's end."""
    start: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Window -> [length, positions]."""


class TorchAttention:
    """One step's attention: where each row's key and value go, and what each row sees."""

    def __init__(self, batch: Batch, cache: TorchKvCache) -> None:
        self.batch = batch
        self.cache = cache
        self.device = cache.device

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """[T] block of each row's token, and its place in the block."""
        where = to_device(cache_indices(self.batch, self.cache.size), self.device)
        return where // self.cache.size, where % self.cache.size

    @cached_property
    def singles(self) -> list[Singles]:
        """Chunks of one token in groups of similar length, for padded products."""
        singles = [chunk for chunk in self.batch.chunks if chunk.length == 1]
        return [self._singles(rows) for rows in similar_lengths(singles, self.cache.size)]

    @cached_property
    def runs(self) -> list[Run]:
        """Longer chunks, for a product each."""
        return [
            Run(slice(row, row + length), to_device(blocks, self.device), start)
            for row, length, start, blocks in paged_chunks(self.batch, self.cache.size)
            if length > 1
        ]

    def _singles(self, rows: list[int]) -> Singles:
        chunks = [self.batch.chunks[row] for row in rows]
        counts = [chunk.start // self.cache.size + 1 for chunk in chunks]
        widest = max(counts)
        table = [
            chunk.sequence.blocks[:count] + chunk.sequence.blocks[:1] * (widest - count)
            for chunk, count in zip(chunks, counts, strict=True)
        ]
        everything = rows == list(range(len(rows)))
        return Singles(
            slice(0, len(rows)) if everything else to_device(rows, self.device),
            to_device(table, self.device),
            to_device([chunk.start for chunk in chunks], self.device),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""
        keys, values = self.cache.layers[layer]
        keys[self.places], values[self.places] = k, v
        out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        for singles in self.singles:
            out[singles.rows] = self._attend_singles(singles, q[singles.rows], keys, values, params)
        for run in self.runs:
            out[run.rows] = self._attend_run(run, q[run.rows], keys, values, params)
        return out

    def _attend_singles(
        self, singles: Singles, q: Tensor, keys: Tensor, values: Tensor, params: AttentionParams
    ) -> Tensor:
        rows, positions = len(q), singles.table.shape[1] * self.cache.size
        k, v = (
            t.index_select(0, singles.table.view(-1)).view(rows, positions, *t.shape[2:]).transpose(1, 2)
            for t in (keys, values)
        )
        if params.window not in singles.masks:
            mask = self._mask(singles.last.unsqueeze(1), positions, params.window)
            singles.masks[params.window] = mask.view(rows, 1, 1, positions)
        grouped = q.reshape(rows, k.shape[1], -1, q.shape[-1])
        return attend(grouped, k, v, singles.masks[params.window], params).reshape(q.shape)

    def _attend_run(self, run: Run, q: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        length, positions = len(q), len(run.blocks) * self.cache.size
        k, v = (t.index_select(0, run.blocks).view(1, positions, *t.shape[2:]).transpose(1, 2) for t in (keys, values))
        groups = q.shape[1] // k.shape[1]
        if params.window not in run.masks:
            rows = torch.arange(run.start, run.start + length, device=self.device).unsqueeze(1)
            run.masks[params.window] = self._mask(rows, positions, params.window).repeat(groups, 1)
        folded = q.transpose(0, 1).reshape(1, k.shape[1], groups * length, q.shape[-1])
        out = attend(folded, k, v, run.masks[params.window], params)
        return out.view(q.shape[1], length, q.shape[-1]).transpose(0, 1)

    def _mask(self, rows: Tensor, positions: int, window: int | None) -> Tensor:
        """[rows, positions] to add to scores: 0 where the row at position ``rows`` [rows, 1] may look, else -inf."""
        columns = torch.arange(positions, device=self.device)
        seen = columns <= rows
        if window is not None:
            seen &= columns > rows - window
        return torch.zeros(seen.shape, device=self.device, dtype=self.cache.dtype).masked_fill_(~seen, -torch.inf)


def similar_lengths(chunks: Sequence[Chunk], size: int) -> list[list[int]]:
    """Indices of single-token chunks in groups whose block counts differ by less than a factor of two."""
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

    The query heads of a group (and the rows of a chunk) are rows of one small matrix: every key is read once a group.
    """
    if params.softcap is not None:
        return attend_reference(q, k, v, mask, params)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=params.scale)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, params: AttentionParams) -> Tensor:
    """The definition, in float32; also serves models with capped scores, which torch's fused attention cannot cap."""
    scores = q.float() @ k.float().transpose(-1, -2) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    return ((scores + mask).softmax(-1) @ v.float()).to(q.dtype)
