"""Paged attention as a Triton kernel, for decode and for prefill.

FlashAttention's online softmax (Dao et al. 2022) over keys and values that lie in blocks, the query heads of a group
as rows of one product. Work is cut into tiles: a row of its own, or as many rows of a chunk as fill a product. The keys
of a lone row are dealt out to :data:`SPLITS` programs in turns of :data:`KEYS`, and a second kernel puts their parts
together (Flash-Decoding); the keys of a chunk are taken in order. Steps over keys are aligned to positions and a masked
key adds an exact zero, so a row's result depends on its own context alone, not on what is beside it nor on where its
chunk was cut; but lone rows and rows of chunks differ in the last bits.

What a step needs is read from device buffers and the grid depends on the number of tiles alone, as a captured CUDA
graph needs it. Block sizes are not measured.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from server.compute.cuda.dots import dot_type
from server.compute.transfer import to_device

FIELDS = 4
"""Of a tile: first row of the batch, rows, position of the first, offset of its sequence's blocks."""
KEYS = 64
"""Keys in a step of the softmax."""
SPLITS = 16
"""Programs that share the keys of a lone row. Fixed, so that the order of summation is."""
COLUMNS = 64
"""Rows times query heads of a group in a tile of a chunk, where the group is not larger."""
_FIELDS = tl.constexpr(FIELDS)
_KEYS = tl.constexpr(KEYS)

Part = tuple[int, int, int, Sequence[int]]
"""(First row of the batch, rows, position of the first, blocks up to the last): rows of one sequence."""


@dataclass(frozen=True)
class AttentionTiles:
    """Which rows attend over which blocks, on the device."""

    singles: Tensor
    """[tiles, FIELDS] int32, of one row each; no rows: padding, which is neither read nor written."""
    chunks: Tensor
    """[tiles, FIELDS] int32, of up to ``height`` rows each."""
    blocks: Tensor
    """[any] int32."""
    height: int


def tile_height(group: int) -> int:
    """Rows in a tile of a chunk, where ``group`` query heads share a key."""
    return max(1, COLUMNS // group)


def attention_tiles(parts: Iterable[Part], group: int, device: torch.device) -> AttentionTiles:
    """Tiles for ``parts``, in one copy to ``device``."""
    singles: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    blocks: list[int] = []
    height = tile_height(group)
    for start, rows, position, theirs in parts:
        for first in range(0, rows, height):
            tile = (start + first, min(height, rows - first), position + first, len(blocks))
            (singles if rows == 1 else chunks).append(tile)
        blocks += theirs
    table = np.array([*singles, *chunks], dtype=np.int32).ravel()
    flat = to_device(np.concatenate([table, np.array(blocks, dtype=np.int32)]), device)
    lengths = [len(singles) * FIELDS, len(chunks) * FIELDS, len(blocks)]
    a, b, c = (flat[end - n : end] for n, end in zip(lengths, accumulate(lengths), strict=True))
    return AttentionTiles(a.view(-1, FIELDS), b.view(-1, FIELDS), c, height)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: tuple[Tensor, Tensor],
    tiles: AttentionTiles,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Write new keys and values [T, KVH, D] to their blocks, then attend: q [T, H, D] -> [T, H, D].

    ``cache`` is keys and values, each [blocks, size, KVH, D]. Scale, window and softcap as in
    :class:`server.compute.attention.AttentionParams`. Rows in no tile are left undefined.
    """
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    _write_new(k, v, cache, tiles)
    _, size, kv_heads, width = cache[0].shape
    kind = {
        **{"group": q.shape[1] // kv_heads, "window": window or 0, "softcap": softcap or 0.0, "dot": dot_type(q.dtype)},
        **{"size": size, "kv_heads": kv_heads, "width": width, "wide": _padded(width)},
    }
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    if len(tiles.singles):
        _attend_singles(q, cache, out, tiles, scale, kind)
    if len(tiles.chunks):
        columns = _padded(tiles.height * kind["group"])
        _attend[(len(tiles.chunks), kv_heads, 1)](
            *(q, *cache, out, out, tiles.chunks, tiles.blocks, q.stride(0), q.stride(1), scale / math.log(2)),
            **{"height": tiles.height, "columns": columns, "splits": 1, **kind},
        )
    return out


def _padded(n: int) -> int:
    """The next power of two that tensor cores can take."""
    return max(16, int(triton.next_power_of_2(n)))


def _write_new(k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], tiles: AttentionTiles) -> None:
    _, size, kv_heads, width = cache[0].shape
    for table, height in ((tiles.singles, 1), (tiles.chunks, tiles.height)):
        if len(table):
            _write[(len(table), kv_heads)](
                *(k, v, *cache, table, tiles.blocks, k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
                height=triton.next_power_of_2(height),
                **{"size": size, "kv_heads": kv_heads, "width": width, "wide": _padded(width)},
            )


def _attend_singles(
    q: Tensor, cache: tuple[Tensor, Tensor], out: Tensor, tiles: AttentionTiles, scale: float, kind: dict[str, Any]
) -> None:
    rows, (_, heads, width) = len(tiles.singles), q.shape
    parts = torch.empty(rows, heads, SPLITS, width, device=q.device, dtype=torch.float32)
    peaks = torch.empty(rows, heads, SPLITS, 2, device=q.device, dtype=torch.float32)
    _attend[(rows, kind["kv_heads"], SPLITS)](
        *(q, *cache, parts, peaks, tiles.singles, tiles.blocks, q.stride(0), q.stride(1), scale / math.log(2)),
        **{"height": 1, "columns": _padded(kind["group"]), "splits": SPLITS, **kind},
    )
    _combine[(rows, heads)](
        *(parts, peaks, out, tiles.singles),
        **{"heads": heads, "splits": SPLITS, **{name: kind[name] for name in ("width", "wide", "window")}},
    )


@triton.jit
def _tile(tiles, number):
    """Fields of a tile: see FIELDS."""
    at = tiles + number * _FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _write(
    k,
    v,
    keys,
    values,
    tiles,
    blocks,
    k_row,
    k_head,
    v_row,
    v_head,
    height: tl.constexpr,
    size: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
):
    """Put a tile's keys and values of one head where they belong."""
    row, rows, start, table = _tile(tiles, tl.program_id(0))
    head = tl.program_id(1)
    i, d = tl.arange(0, height), tl.arange(0, wide)
    there = (i < rows)[:, None] & (d < width)[None, :]
    position = start + i
    block = tl.load(blocks + table + position // size, mask=i < rows, other=0).to(tl.int64)
    to = ((block * size + position % size) * kv_heads + head)[:, None] * width + d[None, :]
    of = (row + i).to(tl.int64)[:, None]
    tl.store(keys + to, tl.load(k + of * k_row + head * k_head + d[None, :], mask=there), mask=there)
    tl.store(values + to, tl.load(v + of * v_row + head * v_head + d[None, :], mask=there), mask=there)


@triton.jit
def _attend(
    q,
    keys,
    values,
    out,
    peaks,
    tiles,
    blocks,
    q_row,
    q_head,
    scale,
    height: tl.constexpr,
    columns: tl.constexpr,
    splits: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    group: tl.constexpr,
    dot: tl.constexpr,
    size: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
):
    """A tile's rows over every ``splits``-th step of their keys, for the query heads of one group.

    Column c is head c % group of row c // group. ``scale`` is that of scores, by the binary logarithm of e. With one
    split ``out`` is the result [T, H, D]; with more, sums [tiles, H, splits, D] and, in ``peaks`` [tiles, H, splits,
    2], the largest score and the sum of weights, nothing for splits without keys.
    """
    row, rows, start, table = _tile(tiles, tl.program_id(0))
    group_head, split = tl.program_id(1), tl.program_id(2)
    column, d, key = tl.arange(0, columns), tl.arange(0, wide), tl.arange(0, _KEYS)
    i = column // group
    head = group_head * group + column % group
    live = (i < rows) & (i < height)
    of = (row + i).to(tl.int64) * q_row + head * q_head
    there = live[:, None] & (d < width)[None, :]
    queries = tl.load(q + of[:, None] + d[None, :], mask=there, other=0).to(dot)
    position = start + i
    last = start + rows - 1
    first = 0
    if window > 0:
        first = tl.maximum(start - window + 1, 0) // _KEYS * _KEYS
    peak = tl.full((columns,), float("-inf"), tl.float32)
    total = tl.zeros((columns,), tl.float32)
    sums = tl.zeros((columns, wide), tl.float32)
    for begin in range(first + split * _KEYS, tl.where(rows > 0, last + 1, 0), splits * _KEYS):
        n = begin + key
        block = tl.load(blocks + table + n // size, mask=n <= last, other=0).to(tl.int64)
        at = ((block * size + n % size) * kv_heads + group_head)[:, None] * width + d[None, :]
        inside = (n <= last)[:, None] & (d < width)[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(keys + at, mask=inside, other=0).to(dot)), input_precision="ieee")
        scores *= scale
        if softcap > 0:
            # cap * tanh(s / cap), both by log2(e); tanh by way of exp2
            cap = softcap * 1.4426950408889634
            scores = cap * (1 - 2 / (tl.exp2(scores * (2 * 1.4426950408889634 / cap)) + 1))
        seen = (n[None, :] <= position[:, None]) & (n <= last)[None, :]
        if window > 0:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.load(values + at, mask=inside, other=0)
        sums = tl.dot(weights.to(mixed.dtype).to(dot), mixed.to(dot), sums * fade[:, None], input_precision="ieee")
        peak = higher
    if splits == 1:
        to = ((row + i).to(tl.int64) * (kv_heads * group) + head)[:, None] * width + d[None, :]
        share = tl.where(live, total, 1)
        tl.store(out + to, (sums / share[:, None]).to(out.dtype.element_ty), mask=there)
    elif first + split * _KEYS <= last:
        to = (tl.program_id(0).to(tl.int64) * (kv_heads * group) + head) * splits + split
        tl.store(out + to[:, None] * width + d[None, :], sums, mask=there)
        tl.store(peaks + to * 2, peak, mask=live)
        tl.store(peaks + to * 2 + 1, total, mask=live)


@triton.jit
def _combine(
    parts,
    peaks,
    out,
    tiles,
    heads: tl.constexpr,
    splits: tl.constexpr,
    window: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
):
    """Put the splits of one row and head together: out [T, H, D]."""
    row, rows, last, _ = _tile(tiles, tl.program_id(0))
    head = tl.program_id(1)
    first = 0
    if window > 0:
        first = tl.maximum(last - window + 1, 0) // _KEYS * _KEYS
    split, d = tl.arange(0, splits), tl.arange(0, wide)
    used = first + split * _KEYS <= last
    at = (tl.program_id(0).to(tl.int64) * heads + head) * splits + split
    if rows > 0:
        peak = tl.load(peaks + at * 2, mask=used, other=float("-inf"))
        total = tl.load(peaks + at * 2 + 1, mask=used, other=0)
        inside = used[:, None] & (d < width)[None, :]
        sums = tl.load(parts + at[:, None] * width + d[None, :], mask=inside, other=0)
        weight = tl.exp2(peak - tl.max(peak, 0))
        result = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
        to = (row.to(tl.int64) * heads + head) * width + d
        tl.store(out + to, result.to(out.dtype.element_ty), mask=d < width)
