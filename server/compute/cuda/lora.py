"""LoRA for the rows of a batch as Triton kernels: every row has its own adapters, of any rank, in any pages.

As in punica's SGMV (Chen et al. 2023), a shrink kernel (``h = x @ A.T``) and an expand kernel (``y += h @ B``) over
rows with the same adapters. Adapters are read page by page from :class:`server.compute.pool.AdapterPool`, so that each
costs its own rank and not the largest. There are two pairs of kernels. For decode, each row is a tile of its own and
reads A and B as vectors; prefill chunks are divided into tiles of rows, which tensor cores multiply.

Sums are float32. The input features are split at fixed places (:data:`SPLIT_FEATURES`), and the splits and a row's
pages are summed in a fixed order. So, within a pair of kernels, a row's result does not depend on the rest of the
batch. The two pairs sum in different orders and differ in the last bits.

All that a step needs is read from device buffers, and the grid of the decode pair depends on the number of rows alone,
so that CUDA graphs can replay it for any adapters. Block sizes have not been tuned.
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
from server.compute.cuda.dot_dtype import dot_dtype
from server.compute.lora_mapping import AdaptedRows, LoraMapping, WeightedPage
from server.compute.reference.lora import TorchLora
from server.compute.transfer import to_device
from server.engine.slots import PAGE

TILE_FIELDS = 5
"""Of a tile: first row in the batch, rows, offset into ``pages``, number of pages, offset of its pairs in h."""
TILE_ROWS = 32
"""Rows of a prefill tile."""
ROW_PROGRAMS = 2
"""Programs that share the pages of a decode row."""
SPLIT_FEATURES = 2048
"""Input features that one program sums. Fixed, so that the order of summation is, too."""

_TILE_FIELDS = tl.constexpr(TILE_FIELDS)
_TILE_ROWS = tl.constexpr(TILE_ROWS)
_PAGE = tl.constexpr(PAGE)
_SPLIT_FEATURES = tl.constexpr(SPLIT_FEATURES)


@dataclass(frozen=True)
class LoraTiles:
    """Which rows take which pages with which weight, on the device."""

    decode: Tensor
    """[tiles, TILE_FIELDS] int32, of one row each. A tile without pages is a row of the base, or padding."""
    prefill: Tensor
    """[tiles, TILE_FIELDS] int32, of up to TILE_ROWS rows each."""
    pages: Tensor
    """[any] int32."""
    weights: Tensor
    """[any] float32, one for each of ``pages``."""
    pairs: int
    """Pairs of a row and one of its pages, for which h needs memory."""


def lora_tiles(adapted: Iterable[AdaptedRows], device: torch.device) -> LoraTiles:
    """Tiles for the rows in ``adapted``, in one copy to ``device``."""
    decode: list[tuple[int, ...]] = []
    prefill: list[tuple[int, ...]] = []
    all_pages: list[WeightedPage] = []
    pairs = 0
    for start, rows, pages in adapted:
        for row in range(start, start + rows, TILE_ROWS):
            height = min(TILE_ROWS, start + rows - row)
            (decode if rows == 1 else prefill).append((row, height, len(all_pages), len(pages), pairs))
            pairs += height * len(pages)
        all_pages += pages
    tiles = np.array([*decode, *prefill], dtype=np.int32)
    numbers = np.array([page for page, _ in all_pages], dtype=np.int32)
    weights = np.array([weight for _, weight in all_pages], dtype=np.float32)
    flat = to_device(np.concatenate([tiles.ravel(), numbers, weights.view(np.int32)]), device)
    lengths = [len(decode) * TILE_FIELDS, len(prefill) * TILE_FIELDS, len(numbers), len(weights)]
    a, b, c, d = (flat[end - n : end] for n, end in zip(lengths, accumulate(lengths), strict=True))
    return LoraTiles(a.view(-1, TILE_FIELDS), b.view(-1, TILE_FIELDS), c, d.view(torch.float32), pairs)


class TritonLora(TorchLora):
    """See :class:`server.compute.backend.GroupLora`. The layout is the reference's."""

    def pack(self, a: Tensor, bs: Sequence[Tensor | None]) -> PackedGroup:
        """In pinned memory, so that copies to the device run in the background."""
        a, packed = super().pack(a, bs)
        if self.device.type != "cuda":
            return a, packed
        return a.pin_memory(), tuple(None if b is None else b.pin_memory() for b in packed)

    def add(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], mapping: LoraMapping) -> None:
        """Two kernel launches for all decode rows, and two for all prefill chunks."""
        assert self.a is not None
        tiles = mapping.derive(LoraTiles, self._tiles)
        add_lora(x, self.a, [b if i in active else None for i, b in enumerate(self.b)], outputs, tiles)

    def _tiles(self, mapping: LoraMapping) -> LoraTiles:
        return lora_tiles([rows for segment in mapping.segments for rows in segment.adapted_rows()], self.device)


def add_lora(x: Tensor, a: Tensor, bs: Sequence[Tensor | None], outputs: Sequence[Tensor], tiles: LoraTiles) -> None:
    """Add LoRA of ``x`` [rows, in] in place to ``outputs`` [rows, out].

    ``a`` [pages, members, PAGE, in] and, for each member, ``bs`` [pages, PAGE, out], as in :class:`TritonLora`. At most
    three members. Where b is None the output stays as it is. All of one dtype.
    """
    members = [(i, b, y) for i, (b, y) in enumerate(zip(bs, outputs, strict=True)) if b is not None]
    if not members:
        return
    x = x.contiguous()
    splits = triton.cdiv(a.shape[3], SPLIT_FEATURES)
    h = torch.empty(splits, max(tiles.pairs, 1), a.shape[1], PAGE, device=x.device, dtype=torch.float32)
    if len(tiles.decode):
        _shrink(_shrink_decode_kernel, ROW_PROGRAMS, x, a, h, tiles.decode, tiles)
        _expand(_expand_decode_kernel, 256, members, h, tiles.decode, tiles)
    if len(tiles.prefill):
        _shrink(_shrink_prefill_kernel, 1, x, a, h, tiles.prefill, tiles)
        _expand(_expand_prefill_kernel, 128, members, h, tiles.prefill, tiles)


def _shrink(kernel, row_programs: int, x: Tensor, a: Tensor, h: Tensor, table: Tensor, tiles: LoraTiles) -> None:
    _, members, _, features = a.shape
    kernel[(len(table) * row_programs, members, h.shape[0])](
        *(x, a, h, table, tiles.pages, tiles.weights, h.shape[1]),
        features=features,
        members=members,
        row_programs=row_programs,
        dot=dot_dtype(x.dtype),
    )


def _expand(
    kernel, block_out: int, members: list[tuple[int, Tensor, Tensor]], h: Tensor, table: Tensor, tiles: LoraTiles
) -> None:
    """One launch for up to three outputs: the programs of one output follow those of the one before it."""
    blocks = sum(triton.cdiv(y.shape[1], block_out) for _, _, y in members)
    numbers, bs, ys = zip(*(members + members[:1] * (3 - len(members))), strict=True)
    outs = [y.shape[1] if i < len(members) else 0 for i, y in enumerate(ys)]
    kernel[(len(table), blocks)](
        *(h, table, tiles.pages, h.shape[1], *bs, *ys, *outs, *(y.stride(0) for y in ys), *numbers),
        members=h.shape[2],
        splits=h.shape[0],
        block_out=block_out,
        dot=dot_dtype(ys[0].dtype),
    )


@triton.jit
def _load_tile(tiles, number):
    """A tile's fields: see TILE_FIELDS."""
    at = tiles + number * _TILE_FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit(do_not_specialize=["pairs"])
def _shrink_decode_kernel(
    x,
    a,
    h,
    tiles,
    pages,
    weights,
    pairs,
    features: tl.constexpr,
    members: tl.constexpr,
    row_programs: tl.constexpr,
    dot: tl.constexpr,
    block_in: tl.constexpr = 512,
):
    """Compute h [splits, pairs, members, PAGE] = weight * x[row] @ A.T, for every ``row_programs``-th page of a row."""
    program, member, split = tl.program_id(0) % row_programs, tl.program_id(1), tl.program_id(2)
    row, _, first_page, count, first_pair = _load_tile(tiles, tl.program_id(0) // row_programs)
    ranks = tl.arange(0, _PAGE)
    for j in range(program, count, row_programs):
        page = tl.load(pages + first_page + j).to(tl.int64)
        a_rows = a + ((page * members + member) * _PAGE + ranks[:, None]) * features
        sums = tl.zeros((_PAGE, block_in), tl.float32)
        for k in range(0, _SPLIT_FEATURES, block_in):
            i = split * _SPLIT_FEATURES + k + tl.arange(0, block_in)
            x_block = tl.load(x + row.to(tl.int64) * features + i, mask=i < features, other=0).to(tl.float32)
            a_block = tl.load(a_rows + i[None, :], mask=i[None, :] < features, other=0).to(tl.float32)
            sums += a_block * x_block[None, :]
        to = ((split * pairs + first_pair + j).to(tl.int64) * members + member) * _PAGE
        tl.store(h + to + ranks, tl.sum(sums, 1) * tl.load(weights + first_page + j))


@triton.jit(do_not_specialize=["pairs"])
def _shrink_prefill_kernel(
    x,
    a,
    h,
    tiles,
    pages,
    weights,
    pairs,
    features: tl.constexpr,
    members: tl.constexpr,
    row_programs: tl.constexpr,
    dot: tl.constexpr,
    block_in: tl.constexpr = 128,
):
    """The same for the rows of a tile, two pages at a time: 16 columns, the fewest that tensor cores multiply."""
    member, split = tl.program_id(1), tl.program_id(2)
    row, rows, first_page, count, first_pair = _load_tile(tiles, tl.program_id(0))
    i = tl.arange(0, _TILE_ROWS)
    ranks = tl.arange(0, 2 * _PAGE) % _PAGE
    for begin in range(0, count, 2):
        j = begin + tl.arange(0, 2 * _PAGE) // _PAGE
        page = tl.load(pages + first_page + j, mask=j < count, other=0).to(tl.int64)
        a_rows = a + ((page * members + member) * _PAGE + ranks) * features
        sums = tl.zeros((_TILE_ROWS, 2 * _PAGE), tl.float32)
        for k in range(0, _SPLIT_FEATURES, block_in):
            n = split * _SPLIT_FEATURES + k + tl.arange(0, block_in)
            mask = (i < rows)[:, None] & (n < features)[None, :]
            x_block = tl.load(x + (row + i).to(tl.int64)[:, None] * features + n[None, :], mask=mask, other=0)
            mask = (n < features)[:, None] & (j < count)[None, :]
            a_block = tl.load(a_rows[None, :] + n[:, None], mask=mask, other=0)
            sums = tl.dot(x_block.to(dot), a_block.to(dot), sums, input_precision="ieee")
        sums *= tl.load(weights + first_page + j, mask=j < count, other=0)[None, :]
        to = split * pairs + first_pair + i[:, None] * count + j[None, :]
        to = (to.to(tl.int64) * members + member) * _PAGE + ranks[None, :]
        tl.store(h + to, sums, mask=(i < rows)[:, None] & (j < count)[None, :])


@triton.jit
def _select_output(
    program, b0, b1, b2, y0, y1, y2, out0, out1, out2, stride0, stride1, stride2, m0, m1, m2, block_out: tl.constexpr
):
    """Which of three outputs a program computes, and which of its blocks."""
    b, y, out, stride, member = b0, y0, out0, stride0, m0
    end0 = tl.cdiv(out0, block_out)
    end1 = end0 + tl.cdiv(out1, block_out)
    block = program
    if program >= end1:
        b, y, out, stride, member = b2, y2, out2, stride2, m2
        block = program - end1
    elif program >= end0:
        b, y, out, stride, member = b1, y1, out1, stride1, m1
        block = program - end0
    return b, y, out, stride, member, block


@triton.jit(do_not_specialize=["pairs", "m0", "m1", "m2", "out1", "out2"])
def _expand_decode_kernel(
    h,
    tiles,
    pages,
    pairs,
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
    block_out: tl.constexpr,
    dot: tl.constexpr,
):
    """Compute y += h @ B for ``block_out`` outputs of one row. Nothing is written for a row without pages."""
    row, _, first_page, count, first_pair = _load_tile(tiles, tl.program_id(0))
    b, y, out, stride, member, block = _select_output(
        tl.program_id(1), b0, b1, b2, y0, y1, y2, out0, out1, out2, stride0, stride1, stride2, m0, m1, m2, block_out
    )
    ranks = tl.arange(0, _PAGE)
    n = block * block_out + tl.arange(0, block_out)
    if count > 0:
        sums = tl.zeros((block_out,), tl.float32)
        for j in range(0, count):
            page = tl.load(pages + first_page + j).to(tl.int64)
            h_pages = tl.zeros((_PAGE,), tl.float32)
            for split in range(splits):
                h_pages += tl.load(
                    h + ((split * pairs + first_pair + j).to(tl.int64) * members + member) * _PAGE + ranks
                )
            b_page = b + (page * _PAGE + ranks)[:, None] * out + n[None, :]
            b_page = tl.load(b_page, mask=n[None, :] < out, other=0).to(tl.float32)
            sums += tl.sum(h_pages[:, None] * b_page, 0)
        to = y + row.to(tl.int64) * stride + n
        before = tl.load(to, mask=n < out, other=0).to(tl.float32)
        tl.store(to, (before + sums).to(y.dtype.element_ty), mask=n < out)


@triton.jit(do_not_specialize=["pairs", "m0", "m1", "m2", "out1", "out2"])
def _expand_prefill_kernel(
    h,
    tiles,
    pages,
    pairs,
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
    block_out: tl.constexpr,
    dot: tl.constexpr,
):
    """The same for the rows of a tile, two pages at a time. h is rounded to y's dtype, as PEFT does."""
    row, rows, first_page, count, first_pair = _load_tile(tiles, tl.program_id(0))
    b, y, out, stride, member, block = _select_output(
        tl.program_id(1), b0, b1, b2, y0, y1, y2, out0, out1, out2, stride0, stride1, stride2, m0, m1, m2, block_out
    )
    i = tl.arange(0, _TILE_ROWS)
    ranks = tl.arange(0, 2 * _PAGE) % _PAGE
    n = block * block_out + tl.arange(0, block_out)
    if count > 0:
        sums = tl.zeros((_TILE_ROWS, block_out), tl.float32)
        for begin in range(0, count, 2):
            j = begin + tl.arange(0, 2 * _PAGE) // _PAGE
            page = tl.load(pages + first_page + j, mask=j < count, other=0).to(tl.int64)
            mask = (i < rows)[:, None] & (j < count)[None, :]
            h_pages = tl.zeros((_TILE_ROWS, 2 * _PAGE), tl.float32)
            for split in range(splits):
                source = (split * pairs + first_pair + i[:, None] * count + j[None, :]).to(tl.int64)
                h_pages += tl.load(h + (source * members + member) * _PAGE + ranks[None, :], mask=mask, other=0)
            b_page = b + (page * _PAGE + ranks)[:, None] * out + n[None, :]
            b_page = tl.load(b_page, mask=(j < count)[:, None] & (n < out)[None, :], other=0)
            sums = tl.dot(h_pages.to(b_page.dtype).to(dot), b_page.to(dot), sums, input_precision="ieee")
        mask = (i < rows)[:, None] & (n < out)[None, :]
        to = y + (row + i).to(tl.int64)[:, None] * stride + n[None, :]
        before = tl.load(to, mask=mask, other=0).to(tl.float32)
        tl.store(to, (before + sums).to(y.dtype.element_ty), mask=mask)
