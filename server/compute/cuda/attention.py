"""Paged attention as a Triton kernel, for decode and for prefill.

FlashAttention's online softmax (Dao et al. 2022) over keys and values in blocks. The query heads that share a key are
rows of one matrix product. Work is divided into tiles: one row of decode, or as many rows of a prefill chunk as fill a
product. The keys of a decode row are shared by :data:`KV_SPLITS` programs, :data:`BLOCK_KEYS` at a time in turn, and a
second kernel combines their results (Flash-Decoding). The keys of a prefill tile are read by one program, in order.

Steps over keys begin at multiples of BLOCK_KEYS, and a masked key adds an exact zero. So a row's result depends on its
own context alone, not on the rest of the batch or on where its prompt was cut into chunks. Decode and prefill sum in
different orders and differ in the last bits.

All that a step needs is read from device buffers, and the grid depends on the number of tiles alone, so that CUDA
graphs can replay it. Block sizes have not been tuned.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from server.compute.attention import AttentionParams, PagedChunk
from server.compute.cuda.dot_dtype import dot_dtype
from server.compute.transfer import to_device

TILE_FIELDS = 4
"""Of a tile: first row in the batch, rows, position of the first row, offset of its sequence's blocks in ``blocks``."""
BLOCK_KEYS = 64
"""Keys in one step of the softmax."""
KV_SPLITS = 16
"""Programs that share the keys of a decode row. Fixed, so that the order of summation is, too."""
BLOCK_QUERIES = 64
"""Queries in a prefill tile: rows times the query heads that share a key. At least one row, however many heads."""
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)
_BLOCK_KEYS = tl.constexpr(BLOCK_KEYS)
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class AttentionTiles:
    """Which rows attend over which blocks, on the device."""

    decode: Tensor
    """[tiles, TILE_FIELDS] int32, of one row each. A tile with 0 rows is padding: nothing is read or written for it."""
    prefill: Tensor
    """[tiles, TILE_FIELDS] int32, of up to ``prefill_rows`` rows each."""
    blocks: Tensor
    """[any] int32, the blocks of all sequences."""
    prefill_rows: int


def rows_per_tile(group: int) -> int:
    """Rows in a prefill tile, where ``group`` query heads share a key."""
    return max(1, BLOCK_QUERIES // group)


def attention_tiles(chunks: Iterable[PagedChunk], group: int, device: torch.device) -> AttentionTiles:
    """Tiles for ``chunks``, in one copy to ``device``. ``group``: query heads that share a key."""
    decode: list[tuple[int, ...]] = []
    prefill: list[tuple[int, ...]] = []
    blocks: list[int] = []
    height = rows_per_tile(group)
    for chunk in chunks:
        for row in range(0, chunk.rows, height):
            tile = (chunk.first_row + row, min(height, chunk.rows - row), chunk.start + row, len(blocks))
            (decode if chunk.rows == 1 else prefill).append(tile)
        blocks += chunk.blocks
    tiles = np.array([*decode, *prefill], dtype=np.int32).ravel()
    flat = to_device(np.concatenate([tiles, np.array(blocks, dtype=np.int32)]), device)
    lengths = [len(decode) * TILE_FIELDS, len(prefill) * TILE_FIELDS, len(blocks)]
    a, b, c = (flat[end - n : end] for n, end in zip(lengths, accumulate(lengths), strict=True))
    return AttentionTiles(a.view(-1, TILE_FIELDS), b.view(-1, TILE_FIELDS), c, height)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], tiles: AttentionTiles, params: AttentionParams
) -> Tensor:
    """Write new keys and values [T, KVH, D] to their blocks, then attend: q [T, H, D] -> [T, H, D].

    ``cache``: keys and values, each [blocks, size, KVH, D]. Rows that are in no tile are left undefined.
    """
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    _write_kv(k, v, cache, tiles)
    _, size, kv_heads, head_dim = cache[0].shape
    constants = {
        **{"group": q.shape[1] // kv_heads, "window": params.window or 0, "softcap": params.softcap or 0.0},
        **{"size": size, "kv_heads": kv_heads, "head_dim": head_dim, "block_d": _padded(head_dim)},
        "dot": dot_dtype(q.dtype),
    }
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    scale = params.scale / math.log(2)
    if len(tiles.decode):
        _attend_decode(q, cache, out, tiles, scale, constants)
    if len(tiles.prefill):
        block_queries = _padded(tiles.prefill_rows * constants["group"])
        _attention_kernel[(len(tiles.prefill), kv_heads, 1)](
            *(q, *cache, out, out, tiles.prefill, tiles.blocks, q.stride(0), q.stride(1), scale),
            **{"tile_rows": tiles.prefill_rows, "block_queries": block_queries, "splits": 1, **constants},
        )
    return out


def _padded(n: int) -> int:
    """The next power of two, and at least 16: the smallest size that tensor cores multiply."""
    return max(16, int(triton.next_power_of_2(n)))


def _write_kv(k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], tiles: AttentionTiles) -> None:
    _, size, kv_heads, head_dim = cache[0].shape
    for table, rows in ((tiles.decode, 1), (tiles.prefill, tiles.prefill_rows)):
        if len(table):
            _write_kv_kernel[(len(table), kv_heads)](
                *(k, v, *cache, table, tiles.blocks, k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
                block_rows=triton.next_power_of_2(rows),
                **{"size": size, "kv_heads": kv_heads, "head_dim": head_dim, "block_d": _padded(head_dim)},
            )


def _attend_decode(
    q: Tensor, cache: tuple[Tensor, Tensor], out: Tensor, tiles: AttentionTiles, scale: float, constants: dict[str, Any]
) -> None:
    rows, (_, heads, head_dim) = len(tiles.decode), q.shape
    partial = torch.empty(rows, heads, KV_SPLITS, head_dim, device=q.device, dtype=torch.float32)
    stats = torch.empty(rows, heads, KV_SPLITS, 2, device=q.device, dtype=torch.float32)
    _attention_kernel[(rows, constants["kv_heads"], KV_SPLITS)](
        *(q, *cache, partial, stats, tiles.decode, tiles.blocks, q.stride(0), q.stride(1), scale),
        **{"tile_rows": 1, "block_queries": _padded(constants["group"]), "splits": KV_SPLITS, **constants},
    )
    _combine_splits_kernel[(rows, heads)](
        *(partial, stats, out, tiles.decode),
        **{"heads": heads, "splits": KV_SPLITS},
        **{name: constants[name] for name in ("head_dim", "block_d", "window")},
    )


@triton.jit
def _load_tile(tiles, number):
    """A tile's fields: see TILE_FIELDS."""
    at = tiles + number * _TILE_FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _cache_offsets(
    blocks, position, mask, kv_head, d, size: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr
):
    """Offsets [positions, block_d] in the key or value cache. ``blocks`` points to the sequence's first block."""
    block = tl.load(blocks + position // size, mask=mask, other=0).to(tl.int64)
    return ((block * size + position % size) * kv_heads + kv_head)[:, None] * head_dim + d[None, :]


@triton.jit
def _first_key(position, window: tl.constexpr):
    """The first key that a query at ``position`` attends to, rounded down to a multiple of BLOCK_KEYS."""
    first = 0
    if window > 0:
        first = tl.maximum(position - window + 1, 0) // _BLOCK_KEYS * _BLOCK_KEYS
    return first


@triton.jit
def _write_kv_kernel(
    k,
    v,
    key_cache,
    value_cache,
    tiles,
    blocks,
    k_row,
    k_head,
    v_row,
    v_head,
    block_rows: tl.constexpr,
    size: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
):
    """Write one head of a tile's new keys and values to their blocks."""
    row, rows, start, table = _load_tile(tiles, tl.program_id(0))
    kv_head = tl.program_id(1)
    i, d = tl.arange(0, block_rows), tl.arange(0, block_d)
    mask = (i < rows)[:, None] & (d < head_dim)[None, :]
    to = _cache_offsets(blocks + table, start + i, i < rows, kv_head, d, size, kv_heads, head_dim)
    source = (row + i).to(tl.int64)[:, None]
    new_keys = tl.load(k + source * k_row + kv_head * k_head + d[None, :], mask=mask)
    tl.store(key_cache + to, new_keys, mask=mask)
    new_values = tl.load(v + source * v_row + kv_head * v_head + d[None, :], mask=mask)
    tl.store(value_cache + to, new_values, mask=mask)


@triton.jit
def _scores(queries, keys, scale, softcap: tl.constexpr):
    """Scores [queries, keys] times log2(e), as exp2 needs them; ``scale`` contains that factor."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    scores *= scale
    if softcap > 0:
        # softcap * tanh(score / softcap), with tanh by way of exp2
        cap = softcap * _LOG2_E
        scores = cap * (1 - 2 / (tl.exp2(scores * (2 * _LOG2_E / cap)) + 1))
    return scores


@triton.jit
def _mask_scores(scores, n, position, last, window: tl.constexpr):
    """Scores with -inf for keys at positions ``n`` that a query at ``position`` must not attend to."""
    visible = (n[None, :] <= position[:, None]) & (n <= last)[None, :]
    if window > 0:
        visible = visible & (n[None, :] > position[:, None] - window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _online_softmax(scores, peak, total):
    """One step of the online softmax: weights of these keys, factor for earlier sums, new peak, new total."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    level = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key so far: avoid -inf - -inf
    weights = tl.exp2(scores - level[:, None])
    rescale = tl.exp2(peak - level)
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, 1)


@triton.jit
def _attention_kernel(
    q,
    key_cache,
    value_cache,
    out,
    stats,
    tiles,
    blocks,
    q_row,
    q_head,
    scale,
    tile_rows: tl.constexpr,
    block_queries: tl.constexpr,
    splits: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    group: tl.constexpr,
    dot: tl.constexpr,
    size: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
):
    """Attention of a tile's rows and one KV head over every ``splits``-th step of their keys.

    Query m is row m // group and head m % group of those that share the key. With one split ``out`` is the result
    [T, H, D]. With more, ``out`` is [tiles, H, splits, D], sums of weighted values, and ``stats`` [tiles, H, splits, 2]
    is the largest score and the sum of weights; nothing is written for splits without keys.
    """
    row, rows, start, table = _load_tile(tiles, tl.program_id(0))
    kv_head, split = tl.program_id(1), tl.program_id(2)
    m, d = tl.arange(0, block_queries), tl.arange(0, block_d)
    i = m // group
    head = kv_head * group + m % group
    live = (i < rows) & (i < tile_rows)
    mask = live[:, None] & (d < head_dim)[None, :]
    source = (row + i).to(tl.int64) * q_row + head * q_head
    queries = tl.load(q + source[:, None] + d[None, :], mask=mask, other=0).to(dot)
    last = start + rows - 1
    first = _first_key(start, window)
    peak = tl.full((block_queries,), float("-inf"), tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    sums = tl.zeros((block_queries, block_d), tl.float32)
    for begin in range(first + split * _BLOCK_KEYS, tl.where(rows > 0, last + 1, 0), splits * _BLOCK_KEYS):
        n = begin + tl.arange(0, _BLOCK_KEYS)
        at = _cache_offsets(blocks + table, n, n <= last, kv_head, d, size, kv_heads, head_dim)
        inside = (n <= last)[:, None] & (d < head_dim)[None, :]
        scores = _scores(queries, tl.load(key_cache + at, mask=inside, other=0).to(dot), scale, softcap)
        scores = _mask_scores(scores, n, start + i, last, window)
        weights, rescale, peak, total = _online_softmax(scores, peak, total)
        values = tl.load(value_cache + at, mask=inside, other=0)
        weights = weights.to(values.dtype).to(dot)
        sums = tl.dot(weights, values.to(dot), sums * rescale[:, None], input_precision="ieee")
    if splits == 1:
        to = ((row + i).to(tl.int64) * (kv_heads * group) + head)[:, None] * head_dim + d[None, :]
        divisor = tl.where(live, total, 1)
        tl.store(out + to, (sums / divisor[:, None]).to(out.dtype.element_ty), mask=mask)
    elif first + split * _BLOCK_KEYS <= last:
        to = (tl.program_id(0).to(tl.int64) * (kv_heads * group) + head) * splits + split
        tl.store(out + to[:, None] * head_dim + d[None, :], sums, mask=mask)
        tl.store(stats + to * 2, peak, mask=live)
        tl.store(stats + to * 2 + 1, total, mask=live)


@triton.jit
def _combine_splits_kernel(
    partial,
    stats,
    out,
    tiles,
    heads: tl.constexpr,
    splits: tl.constexpr,
    window: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
):
    """Combine the splits of one row and head, as the attention kernel wrote them: out [T, H, D]."""
    row, rows, last, _ = _load_tile(tiles, tl.program_id(0))
    head = tl.program_id(1)
    split, d = tl.arange(0, splits), tl.arange(0, block_d)
    used = _first_key(last, window) + split * _BLOCK_KEYS <= last
    at = (tl.program_id(0).to(tl.int64) * heads + head) * splits + split
    if rows > 0:
        peak = tl.load(stats + at * 2, mask=used, other=float("-inf"))
        total = tl.load(stats + at * 2 + 1, mask=used, other=0)
        inside = used[:, None] & (d < head_dim)[None, :]
        sums = tl.load(partial + at[:, None] * head_dim + d[None, :], mask=inside, other=0)
        weight = tl.exp2(peak - tl.max(peak, 0))
        result = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
        to = (row.to(tl.int64) * heads + head) * head_dim + d
        tl.store(out + to, result.to(out.dtype.element_ty), mask=d < head_dim)
