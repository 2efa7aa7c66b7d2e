"""LoRA for the rows of a batch as Triton kernels: every row has its own adapters, of any rank, in any pages.

As in punica's SGMV (Chen et al. 2023) a shrink (``h = x @ A.T``) and an expand (``y += h @ B``), each over segments of
rows with the same adapters. A segment names pages of :class:`server.compute.pool.AdapterPool`, so an adapter costs its
own rank and not the largest. Two pairs of kernels: rows of one token are a segment each and read A and B as vectors;
longer chunks are cut into tiles of rows for tensor cores.

Sums are float32. ``in`` is cut at fixed places (:data:`SPLIT`) and its parts and a row's pages are summed in a fixed
order, so within a pair a row's result does not depend on the rest of the batch. The two pairs differ in the last bits.

What a batch needs is read from device buffers, and the grid of the first pair depends on the number of rows alone: a
captured CUDA graph serves whatever adapters its rows have. Block sizes are not measured.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from server.compute.backend import PackedGroup
from server.compute.cuda.dots import dot_type
from server.compute.lora_mapping import LoraMapping
from server.compute.reference.lora import TorchLora
from server.compute.transfer import to_device
from server.engine.slots import PAGE

FIELDS = 5
"""Of a tile: first row of the batch, rows, offset into pages, how many of them, offset into h in uses."""
TILE = 32
"""Rows of a chunk that are multiplied together."""
LANES = 2
"""Programs that share the pages of one row."""
SPLIT = 2048
"""Inputs of a layer that one program sums; fixed, so that the order of summation is."""

_FIELDS = tl.constexpr(FIELDS)
_TILE = tl.constexpr(TILE)
_PAGE = tl.constexpr(PAGE)
_SPLIT = tl.constexpr(SPLIT)

Part = tuple[int, int, Sequence[tuple[int, float]]]
"""(First row of the batch, rows, (page, weight) of each): rows with the same adapters."""


@dataclass(frozen=True)
class LoraTiles:
    """Which rows take which pages with which weight, on the device."""

    singles: Tensor
    """[tiles, FIELDS] int32, of one row each; no pages: a row of the base."""
    chunks: Tensor
    """[tiles, FIELDS] int32, of up to TILE rows each."""
    pages: Tensor
    """[any] int32."""
    weights: Tensor
    """[any] float32, one for each of ``pages``."""
    uses: int
    """Room in h: pairs of a row and a page."""


def lora_tiles(parts: Iterable[Part], device: torch.device) -> LoraTiles:
    """Tiles for ``parts``, in one copy to ``device``."""
    singles: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    pages: list[tuple[int, float]] = []
    uses = 0
    for start, rows, pairs in parts:
        for row in range(start, start + rows, TILE):
            height = min(TILE, start + rows - row)
            (singles if rows == 1 else chunks).append((row, height, len(pages), len(pairs), uses))
            uses += height * len(pairs)
        pages += pairs
    table = np.array([*singles, *chunks], dtype=np.int32)
    numbers = np.array([page for page, _ in pages], dtype=np.int32)
    weights = np.array([weight for _, weight in pages], dtype=np.float32)
    flat = to_device(np.concatenate([table.ravel(), numbers, weights.view(np.int32)]), device)
    lengths = [len(singles) * FIELDS, len(chunks) * FIELDS, len(pages), len(pages)]
    a, b, c, d = (flat[end - n : end] for n, end in zip(lengths, accumulate(lengths), strict=True))
    return LoraTiles(a.view(-1, FIELDS), b.view(-1, FIELDS), c, d.view(torch.float32), uses)


class TritonLora(TorchLora):
    """See :class:`server.compute.backend.GroupLora`; the memory is the reference's."""

    def pack(self, a: Tensor, bs: Sequence[Tensor | None]) -> PackedGroup:
        """Pinned, so that copies to the device run beside what computes."""
        a, packed = super().pack(a, bs)
        if self.device.type != "cuda":
            return a, packed
        return a.pin_memory(), tuple(None if b is None else b.pin_memory() for b in packed)

    def add(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], mapping: LoraMapping) -> None:
        """All rows in two or four launches."""
        assert self.a is not None
        tiles = mapping.derive(LoraTiles, self._tiles)
        add_lora(x, self.a, [b if i in active else None for i, b in enumerate(self.b)], outputs, tiles)

    def _tiles(self, mapping: LoraMapping) -> LoraTiles:
        return lora_tiles([part for segment in mapping.segments for part in segment.adapted_rows()], self.device)


def add_lora(x: Tensor, a: Tensor, bs: Sequence[Tensor | None], outputs: Sequence[Tensor], tiles: LoraTiles) -> None:
    """Add to each of ``outputs`` [rows, out] what its rows' adapters make of ``x`` [rows, in].

    ``a`` [pages, members, PAGE, in] and ``bs`` [pages, PAGE, out] as in :class:`TritonLora`, at most three
    members; where b is None its output stays as it is. All of one dtype.
    """
    sides = [(i, b, y) for i, (b, y) in enumerate(zip(bs, outputs, strict=True)) if b is not None]
    if not sides:
        return
    x = x.contiguous()
    splits = triton.cdiv(a.shape[3], SPLIT)
    h = torch.empty(splits, max(tiles.uses, 1), a.shape[1], PAGE, device=x.device, dtype=torch.float32)
    if len(tiles.singles):
        _shrink(_shrink_rows, LANES, x, a, h, tiles.singles, tiles)
        _expand(_expand_rows, 256, sides, h, tiles.singles, tiles)
    if len(tiles.chunks):
        _shrink(_shrink_tiles, 1, x, a, h, tiles.chunks, tiles)
        _expand(_expand_tiles, 128, sides, h, tiles.chunks, tiles)


def _shrink(kernel, lanes: int, x: Tensor, a: Tensor, h: Tensor, table: Tensor, tiles: LoraTiles) -> None:
    _, members, _, features = a.shape
    kernel[(len(table) * lanes, members, h.shape[0])](
        *(x, a, h, table, tiles.pages, tiles.weights, h.shape[1]),
        features=features,
        members=members,
        lanes=lanes,
        dot=dot_type(x.dtype),
    )


def _expand(
    kernel, width: int, sides: list[tuple[int, Tensor, Tensor]], h: Tensor, table: Tensor, tiles: LoraTiles
) -> None:
    """One launch for up to three outputs: the programs of each follow those of the one before."""
    blocks = sum(triton.cdiv(y.shape[1], width) for _, _, y in sides)
    numbers, bs, ys = zip(*(sides + sides[:1] * (3 - len(sides))), strict=True)
    outs = [y.shape[1] if i < len(sides) else 0 for i, y in enumerate(ys)]
    kernel[(len(table), blocks)](
        *(h, table, tiles.pages, h.shape[1], *bs, *ys, *outs, *(y.stride(0) for y in ys), *numbers),
        members=h.shape[2],
        splits=h.shape[0],
        width=width,
        dot=dot_type(ys[0].dtype),
    )


@triton.jit
def _tile(tiles, number):
    """Fields of a tile: see FIELDS."""
    at = tiles + number * _FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit(do_not_specialize=["uses"])
def _shrink_rows(
    x,
    a,
    h,
    tiles,
    pages,
    weights,
    uses,
    features: tl.constexpr,
    members: tl.constexpr,
    lanes: tl.constexpr,
    dot: tl.constexpr,
    width: tl.constexpr = 512,
):
    """Into h [splits, uses, members, PAGE]: weight * x [row] A.T, for every ``lanes``-th page of a row."""
    lane, member, part = tl.program_id(0) % lanes, tl.program_id(1), tl.program_id(2)
    row, _, first, count, at = _tile(tiles, tl.program_id(0) // lanes)
    ranks = tl.arange(0, _PAGE)
    for use in range(lane, count, lanes):
        page = tl.load(pages + first + use).to(tl.int64)
        columns = a + ((page * members + member) * _PAGE + ranks[:, None]) * features
        sums = tl.zeros((_PAGE, width), tl.float32)
        for k in range(0, _SPLIT, width):
            i = part * _SPLIT + k + tl.arange(0, width)
            inputs = tl.load(x + row.to(tl.int64) * features + i, mask=i < features, other=0).to(tl.float32)
            down = tl.load(columns + i[None, :], mask=i[None, :] < features, other=0).to(tl.float32)
            sums += down * inputs[None, :]
        to = ((part * uses + at + use).to(tl.int64) * members + member) * _PAGE
        tl.store(h + to + ranks, tl.sum(sums, 1) * tl.load(weights + first + use))


@triton.jit(do_not_specialize=["uses"])
def _shrink_tiles(
    x,
    a,
    h,
    tiles,
    pages,
    weights,
    uses,
    features: tl.constexpr,
    members: tl.constexpr,
    lanes: tl.constexpr,
    dot: tl.constexpr,
    width: tl.constexpr = 128,
):
    """The same for the rows of a tile, two pages at a time: tensor cores want 16 columns."""
    member, part = tl.program_id(1), tl.program_id(2)
    row, rows, first, count, at = _tile(tiles, tl.program_id(0))
    i = tl.arange(0, _TILE)
    rank = tl.arange(0, 2 * _PAGE) % _PAGE
    for pair in range(0, count, 2):
        use = pair + tl.arange(0, 2 * _PAGE) // _PAGE
        page = tl.load(pages + first + use, mask=use < count, other=0).to(tl.int64)
        columns = a + ((page * members + member) * _PAGE + rank) * features
        sums = tl.zeros((_TILE, 2 * _PAGE), tl.float32)
        for k in range(0, _SPLIT, width):
            n = part * _SPLIT + k + tl.arange(0, width)
            there = (i < rows)[:, None] & (n < features)[None, :]
            inputs = tl.load(x + (row + i).to(tl.int64)[:, None] * features + n[None, :], mask=there, other=0)
            there = (n < features)[:, None] & (use < count)[None, :]
            down = tl.load(columns[None, :] + n[:, None], mask=there, other=0)
            sums = tl.dot(inputs.to(dot), down.to(dot), sums, input_precision="ieee")
        sums *= tl.load(weights + first + use, mask=use < count, other=0)[None, :]
        to = part * uses + at + i[:, None] * count + use[None, :]
        to = (to.to(tl.int64) * members + member) * _PAGE + rank[None, :]
        tl.store(h + to, sums, mask=(i < rows)[:, None] & (use < count)[None, :])


@triton.jit
def _side(block, b0, b1, b2, y0, y1, y2, out0, out1, out2, stride0, stride1, stride2, m0, m1, m2, width: tl.constexpr):
    """Which of three outputs a program works on, and at which of its blocks."""
    b, y, out, stride, member = b0, y0, out0, stride0, m0
    before0 = tl.cdiv(out0, width)
    before1 = before0 + tl.cdiv(out1, width)
    at = block
    if block >= before1:
        b, y, out, stride, member = b2, y2, out2, stride2, m2
        at = block - before1
    elif block >= before0:
        b, y, out, stride, member = b1, y1, out1, stride1, m1
        at = block - before0
    return b, y, out, stride, member, at


@triton.jit(do_not_specialize=["uses", "m0", "m1", "m2", "out1", "out2"])
def _expand_rows(
    h,
    tiles,
    pages,
    uses,
    b0,
    b1,
    b2,
    y0,
    y1,
    y2,
    out0,
    out1,
    out2,
    stride0,
    stride1,
    stride2,
    m0,
    m1,
    m2,
    members: tl.constexpr,
    splits: tl.constexpr,
    width: tl.constexpr,
    dot: tl.constexpr,
):
    """Add h B to ``width`` outputs of one row; nothing is written for a row without pages."""
    row, _, first, count, at = _tile(tiles, tl.program_id(0))
    b, y, out, stride, member, block = _side(
        tl.program_id(1), b0, b1, b2, y0, y1, y2, out0, out1, out2, stride0, stride1, stride2, m0, m1, m2, width
    )
    ranks = tl.arange(0, _PAGE)
    n = block * width + tl.arange(0, width)
    if count > 0:
        sums = tl.zeros((width,), tl.float32)
        for use in range(0, count):
            page = tl.load(pages + first + use).to(tl.int64)
            taken = tl.zeros((_PAGE,), tl.float32)
            for part in range(splits):
                taken += tl.load(h + ((part * uses + at + use).to(tl.int64) * members + member) * _PAGE + ranks)
            up = b + (page * _PAGE + ranks)[:, None] * out + n[None, :]
            up = tl.load(up, mask=n[None, :] < out, other=0).to(tl.float32)
            sums += tl.sum(taken[:, None] * up, 0)
        to = y + row.to(tl.int64) * stride + n
        before = tl.load(to, mask=n < out, other=0).to(tl.float32)
        tl.store(to, (before + sums).to(y.dtype.element_ty), mask=n < out)


@triton.jit(do_not_specialize=["uses", "m0", "m1", "m2", "out1", "out2"])
def _expand_tiles(
    h,
    tiles,
    pages,
    uses,
    b0,
    b1,
    b2,
    y0,
    y1,
    y2,
    out0,
    out1,
    out2,
    stride0,
    stride1,
    stride2,
    m0,
    m1,
    m2,
    members: tl.constexpr,
    splits: tl.constexpr,
    width: tl.constexpr,
    dot: tl.constexpr,
):
    """The same for the rows of a tile, two pages at a time; h is rounded to y's dtype, as PEFT does."""
    row, rows, first, count, at = _tile(tiles, tl.program_id(0))
    b, y, out, stride, member, block = _side(
        tl.program_id(1), b0, b1, b2, y0, y1, y2, out0, out1, out2, stride0, stride1, stride2, m0, m1, m2, width
    )
    i = tl.arange(0, _TILE)
    rank = tl.arange(0, 2 * _PAGE) % _PAGE
    n = block * width + tl.arange(0, width)
    if count > 0:
        sums = tl.zeros((_TILE, width), tl.float32)
        for pair in range(0, count, 2):
            use = pair + tl.arange(0, 2 * _PAGE) // _PAGE
            page = tl.load(pages + first + use, mask=use < count, other=0).to(tl.int64)
            there = (i < rows)[:, None] & (use < count)[None, :]
            taken = tl.zeros((_TILE, 2 * _PAGE), tl.float32)
            for part in range(splits):
                of = (part * uses + at + i[:, None] * count + use[None, :]).to(tl.int64)
                taken += tl.load(h + (of * members + member) * _PAGE + rank[None, :], mask=there, other=0)
            up = b + (page * _PAGE + rank)[:, None] * out + n[None, :]
            up = tl.load(up, mask=(use < count)[:, None] & (n < out)[None, :], other=0)
            sums = tl.dot(taken.to(up.dtype).to(dot), up.to(dot), sums, input_precision="ieee")
        there = (i < rows)[:, None] & (n < out)[None, :]
        to = y + (row + i).to(tl.int64)[:, None] * stride + n[None, :]
        before = tl.load(to, mask=there, other=0).to(tl.float32)
        tl.store(to, (before + sums).to(y.dtype.element_ty), mask=there)
