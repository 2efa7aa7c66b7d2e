"""LoRA for the rows of a batch by ``lora.c``: page by page, every row in the same way whatever shares the batch."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from server.compute.backend import GroupShape, PackedGroup
from server.compute.cpu.batches import LoraRows
from server.compute.cpu.kernels import Kernels
from server.compute.cpu.memory import huge_pages
from server.compute.cpu.structures import LORA_MAX_INPUTS, TILE_INPUTS, TILE_ROWS, VECTOR, Lora
from server.compute.lora_mapping import LoraMapping, WeightedPage
from server.compute.reference.lora import TorchLora
from server.engine.sequence import Adaptation


class KernelLora(TorchLora):
    """A group's memory in the kernel's layout, so that it reads every tile in one piece.

    A is [pages, layers, in / 2, PAGE, 2] and each B [pages, out / 16, PAGE / 2, 16, 2], bf16, filled up with zeros to
    whole tiles of 32 inputs and 16 outputs.
    """

    def __init__(self, shape: GroupShape, pages: int, kernels: Kernels) -> None:
        super().__init__(shape, pages, torch.device("cpu"), torch.bfloat16)
        self.kernels = kernels
        self.native = Lora()
        self.native.fill(None, self.b, shape.outs)

    @staticmethod
    def takes(shape: GroupShape, dtype: torch.dtype) -> bool:
        """Whether the kernel computes layers of this shape."""
        return shape.inputs <= LORA_MAX_INPUTS and dtype == torch.bfloat16

    def pack(self, a: Tensor, bs: Sequence[Tensor | None]) -> PackedGroup:
        """Into the kernel's layout."""
        a = F.pad(a, (0, -a.shape[-1] % TILE_INPUTS))
        pages, layers, columns, inputs = a.shape
        tiled = a.reshape(pages, layers, columns, inputs // 2, 2).transpose(2, 3).contiguous()
        return tiled, tuple(None if b is None else _tiled_b(b) for b in bs)

    def reserve(self, packed: PackedGroup) -> bool:
        """In huge pages."""
        taken = super().reserve(packed)
        self.native.fill(self.a, self.b, self.shape.outs)
        return taken

    def add(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], mapping: LoraMapping) -> None:
        """All rows in one call."""
        self.kernels.lora_rows(x, self.native, lora_rows(mapping), active, outputs)

    def _zeros(self, *shape: int) -> Tensor:
        return huge_pages().zeros(*shape, dtype=self.dtype)


def lora_rows(mapping: LoraMapping) -> LoraRows:
    """All rows' pages as the kernel takes them."""
    return mapping.derive(LoraRows, lambda mapping: LoraRows(list(_groups(mapping))))


def _groups(mapping: LoraMapping) -> Iterable[tuple[list[int], list[WeightedPage]]]:
    """Up to TILE_ROWS rows with one adaptation, and its pages."""
    for segment in mapping.segments:
        taking: dict[Adaptation, list[int]] = {}
        if len(segment.adaptations) == 1:
            taking[segment.adaptations[0]] = list(range(segment.start, segment.stop))
        else:
            for row, adaptation in enumerate(segment.adaptations, segment.start):
                taking.setdefault(adaptation, []).append(row)
        for adaptation, rows in taking.items():
            uses = segment.weighted_pages(adaptation)
            for first in range(0, len(rows) if uses else 0, TILE_ROWS):
                yield rows[first : first + TILE_ROWS], uses


def _tiled_b(b: Tensor) -> Tensor:
    """B [pages, PAGE, out] in the kernel's layout."""
    b = F.pad(b, (0, -b.shape[-1] % VECTOR))
    pages, columns, outs = b.shape
    return b.reshape(pages, columns // 2, 2, outs // VECTOR, VECTOR).permute(0, 3, 1, 4, 2).contiguous()
