"""A step's rows in the layout of the C kernels."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from server.compute.cpu.structures import KEY_STEP, LoraBatch


class PagedChunks:
    """Rows that follow each other in one sequence, chunk by chunk, for ``attention.c``."""

    def __init__(self, chunks: Sequence[tuple[int, int, int, Sequence[int]]], size: int) -> None:
        """``chunks`` are (first row of the batch, rows, position of the first, blocks); blocks hold ``size`` tokens."""
        starts = list(accumulate((len(blocks) for *_, blocks in chunks), initial=0))
        self.table = torch.tensor([(*chunk, at) for (*chunk, _), at in zip(chunks, starts, strict=False)])
        self.blocks = torch.tensor([block for *_, blocks in chunks for block in blocks])
        longest = max(len(blocks) for *_, blocks in chunks) * size
        self.context = -(-longest // KEY_STEP) * KEY_STEP


class LoraRows:
    """Which rows take which pages with which weight, for ``lora.c``."""

    def __init__(self, groups: Sequence[tuple[Sequence[int], Sequence[tuple[int, float]]]]) -> None:
        """``groups`` are rows of the batch, at most 16, and the (page, weight) pairs that each of them takes.

        Pages are summed in the order given. That order must not come from where adapters happen to sit: float addition
        is not associative.
        """
        rows = list(accumulate((len(rows) for rows, _ in groups), initial=0))
        pages = list(accumulate((len(uses) for _, uses in groups), initial=0))
        table = [
            (row, len(taking), page, len(uses)) for row, page, (taking, uses) in zip(rows, pages, groups, strict=False)
        ]
        self.pages = pages[-1]
        self._kept = (
            np.array(table, dtype=np.int32),
            np.array([row for taking, _ in groups for row in taking], dtype=np.int32),
            np.array([page for _, uses in groups for page, _ in uses], dtype=np.int32),
            np.array([weight for _, uses in groups for _, weight in uses], dtype=np.float32),
        )
        self.batch = LoraBatch(len(groups), self.pages, *(array.ctypes.data for array in self._kept))
        self.address = ctypes.addressof(self.batch)
