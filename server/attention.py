"""Paged attention behind transformers' AttentionInterface.

:data:`IMPLEMENTATION` is registered as an attention function. Models call it with the new tokens' queries, keys and
values; what it does with them is up to the ``paged`` object that travels as a keyword argument: :class:`Probe` only
records shapes, :class:`PagedBatch` writes keys and values into their blocks and attends over each sequence's own. On
CPUs with AMX one kernel of ours takes all rows and gives each the same bits whatever is beside it; elsewhere rows of
one token and longer chunks are padded products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from server import cuda, native
from server.native.memory import HugePages
from server.sequence import Batch, Chunk

if TYPE_CHECKING:
    from server.cuda.attention import AttentionTiles

IMPLEMENTATION = "manylora_paged"


class Attend(Protocol):
    """What travels as ``paged``."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: "How") -> Tensor:
        """Queries [T, H, D], keys and values [T, KVH, D] -> [T, H, D]."""


@dataclass(frozen=True, slots=True)
class How:
    """A layer's way of attending."""

    scale: float
    window: int | None = None
    """Positions a query sees, itself included; None sees all before it."""
    softcap: float | None = None
    """``cap * tanh(score / cap)`` on the scores (Gemma 2)."""


def paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function for transformers: query [1, H, T, D], key and value [1, KVH, T, D] -> [1, T, H, D].

    That these are all the arguments that matter is checked when a base is loaded (:mod:`bases.architecture`).
    """
    paged: Attend = kwargs["paged"]
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    how = How(scale, kwargs.get("sliding_window"), kwargs.get("softcap"))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = paged.attend(cast("int", module.layer_idx), q, k, v, how)
    return out.unsqueeze(0), None


def register() -> None:
    """Make :data:`IMPLEMENTATION` known to transformers. No mask function: masks are made here."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)


@dataclass(eq=False)
class Probe:
    """Records what each layer caches. Attends to nothing but the token itself."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Layer -> (KV heads, head size)."""
    ways: dict[int, How] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """Values, repeated over the query heads of their group."""
        self.shapes[layer] = (k.shape[1], k.shape[2])
        self.ways[layer] = how
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


class KvCache:
    """Keys and values of ``blocks`` blocks of ``size`` tokens for every layer.

    Blocks hold zeros until written, and :meth:`clear` zeroes a block that changes hands: attention reads whole blocks
    and masks what is not there, and a mask does not stop a NaN.
    """

    def __init__(
        self, shapes: dict[int, tuple[int, int]], blocks: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.size = size
        by_shape: dict[tuple[int, int], list[int]] = {}
        for layer, shape in shapes.items():
            by_shape.setdefault(shape, []).append(layer)
        fits = size % 16 == 0 and all(width % 32 == 0 and width <= 256 for _, width in by_shape)
        self.kernels = native.load() if fits and device.type == "cpu" and dtype == torch.bfloat16 else None
        self.triton = cuda.available(device)
        self._storage = [self._zeros(len(layers), blocks, *shape, device, dtype) for shape, layers in by_shape.items()]
        self.layers: dict[int, tuple[Tensor, Tensor]] = {
            layer: (storage[i, 0], storage[i, 1])
            for storage, layers in zip(self._storage, by_shape.values(), strict=True)
            for i, layer in enumerate(layers)
        }
        """Layer -> keys and values, each [blocks, size, KVH, D]; for the kernels in memory [blocks, KVH, size, D]."""

    def _zeros(
        self, layers: int, blocks: int, heads: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        if self.kernels:  # a head's keys of a block in one piece: read a third faster
            storage = HugePages().zeros(layers, 2, blocks, heads, self.size, width, dtype=dtype)
            return storage.zero_().transpose(3, 4)  # taken now: a machine without room for it should say so at start
        return torch.zeros(layers, 2, blocks, self.size, heads, width, device=device, dtype=dtype)

    @staticmethod
    def block_bytes(shapes: dict[int, tuple[int, int]], size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return sum(2 * size * heads * width * dtype.itemsize for heads, width in shapes.values())

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero ``blocks`` in all layers."""
        numbers = cuda.send(blocks, self._storage[0].device)
        for storage in self._storage:
            storage.index_fill_(2, numbers, 0)


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


class PagedBatch:
    """One step's attention: where each row's key and value go, and what each row sees."""

    def __init__(self, batch: Batch, cache: KvCache, device: torch.device, dtype: torch.dtype) -> None:
        self.cache = cache
        self.device = device
        self.dtype = dtype
        self.chunks = batch.chunks
        self._tiles: dict[int, AttentionTiles] = {}

    @cached_property
    def where(self) -> Tensor:
        """[T] place of each row's token in the cache, in tokens."""
        size = self.cache.size
        places = [c.sequence.blocks[p // size] * size + p % size for c in self.chunks for p in range(c.start, c.end)]
        return cuda.send(places, self.device)

    @cached_property
    def paged_runs(self) -> native.PagedRuns:
        """All chunks, for the kernel."""
        starts = accumulate((chunk.length for chunk in self.chunks), initial=0)
        return native.PagedRuns(
            [(row, c.length, c.start, self._blocks(c)) for row, c in zip(starts, self.chunks, strict=False)],
            self.cache.size,
        )

    @cached_property
    def singles(self) -> list[Singles]:
        """Chunks of one token in groups of similar length, for padded products."""
        singles = [chunk for chunk in self.chunks if chunk.length == 1]
        return [self._singles(rows) for rows in similar_lengths(singles, self.cache.size)]

    @cached_property
    def runs(self) -> list[Run]:
        """Longer chunks, for a product each."""
        longer = [chunk for chunk in self.chunks if chunk.length > 1]
        starts = accumulate((chunk.length for chunk in longer), initial=len(self.chunks) - len(longer))
        return [self._run(row, chunk) for row, chunk in zip(starts, longer, strict=False)]

    def _blocks(self, chunk: Chunk) -> list[int]:
        return chunk.sequence.blocks[: (chunk.end - 1) // self.cache.size + 1]

    def _singles(self, rows: list[int]) -> Singles:
        chunks = [self.chunks[row] for row in rows]
        counts = [chunk.start // self.cache.size + 1 for chunk in chunks]
        widest = max(counts)
        table = [
            chunk.sequence.blocks[:count] + chunk.sequence.blocks[:1] * (widest - count)
            for chunk, count in zip(chunks, counts, strict=True)
        ]
        everything = rows == list(range(len(rows)))
        return Singles(
            slice(0, len(rows)) if everything else cuda.send(rows, self.device),
            cuda.send(table, self.device),
            cuda.send([chunk.start for chunk in chunks], self.device),
        )

    def _run(self, row: int, chunk: Chunk) -> Run:
        blocks = cuda.send(self._blocks(chunk), self.device)
        return Run(slice(row, row + chunk.length), blocks, chunk.start)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """Write this step's keys and values, then attend. q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""
        keys, values = self.cache.layers[layer]
        if self.cache.triton:
            return self._attend_tiles(q, k, v, (keys, values), how)
        place = (self.where // self.cache.size, self.where % self.cache.size)
        keys[place], values[place] = k, v
        if self.cache.kernels:
            return self.cache.kernels.attend(q, keys, values, self.paged_runs, how.window, how.scale, how.softcap)
        out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        for singles in self.singles:
            out[singles.rows] = self._attend_singles(singles, q[singles.rows], keys, values, how)
        for run in self.runs:
            out[run.rows] = self._attend_run(run, q[run.rows], keys, values, how)
        return out

    def _attend_tiles(self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], how: How) -> Tensor:
        from server.cuda.attention import attend, attention_tiles  # needs Triton

        group = q.shape[1] // k.shape[1]
        if group not in self._tiles:
            starts = accumulate((chunk.length for chunk in self.chunks), initial=0)
            parts = [(row, c.length, c.start, self._blocks(c)) for row, c in zip(starts, self.chunks, strict=False)]
            self._tiles[group] = attention_tiles(parts, group, self.device)
        return attend(q, k, v, cache, self._tiles[group], how.scale, how.window, how.softcap)

    def _attend_singles(self, singles: Singles, q: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        rows, positions = len(q), singles.table.shape[1] * self.cache.size
        k, v = (
            t.index_select(0, singles.table.view(-1)).view(rows, positions, *t.shape[2:]).transpose(1, 2)
            for t in (keys, values)
        )
        if how.window not in singles.masks:
            mask = self._mask(singles.last.unsqueeze(1), positions, how.window)
            singles.masks[how.window] = mask.view(rows, 1, 1, positions)
        grouped = q.reshape(rows, k.shape[1], -1, q.shape[-1])
        return attend(grouped, k, v, singles.masks[how.window], how).reshape(q.shape)

    def _attend_run(self, run: Run, q: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        length, positions = len(q), len(run.blocks) * self.cache.size
        k, v = (t.index_select(0, run.blocks).view(1, positions, *t.shape[2:]).transpose(1, 2) for t in (keys, values))
        groups = q.shape[1] // k.shape[1]
        if how.window not in run.masks:
            rows = torch.arange(run.start, run.start + length, device=self.device).unsqueeze(1)
            run.masks[how.window] = self._mask(rows, positions, how.window).repeat(groups, 1)
        folded = q.transpose(0, 1).reshape(1, k.shape[1], groups * length, q.shape[-1])
        out = attend(folded, k, v, run.masks[how.window], how)
        return out.view(q.shape[1], length, q.shape[-1]).transpose(0, 1)

    def _mask(self, rows: Tensor, positions: int, window: int | None) -> Tensor:
        """[rows, positions] to add to scores: 0 where the row at position ``rows`` [rows, 1] may look, else -inf."""
        columns = torch.arange(positions, device=self.device)
        seen = columns <= rows
        if window is not None:
            seen &= columns > rows - window
        return torch.zeros(seen.shape, device=self.device, dtype=self.dtype).masked_fill_(~seen, -torch.inf)


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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, how: How) -> Tensor:
    """Attention of q [B, KVH, G, D] over k, v [B, KVH, L, D] with ``mask`` added, broadcast to [B, KVH, G, L].

    The query heads of a group (and the rows of a chunk) are rows of one small matrix: every key is read once a group.
    """
    if how.softcap is not None:
        return attend_reference(q, k, v, mask, how)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, how: How) -> Tensor:
    """The definition, in float32; also serves models with capped scores, which torch's fused attention cannot cap."""
    scores = q.float() @ k.float().transpose(-1, -2) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    return ((scores + mask).softmax(-1) @ v.float()).to(q.dtype)
