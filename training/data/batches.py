"""Groups rows into batches and orders them."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from training.data.packing import PackedRow, pack
from training.data.rendering import Example

SORTED_BATCHES = 16
"""Rows are sorted by length within groups of this many batches: this saves most padding and keeps batches random."""


def make_rows(examples: Sequence[Example], max_length: int, packing: bool, seed: int) -> list[PackedRow]:
    """Return the rows to train on: several examples packed into each, or one example in each."""
    if packing:
        return pack(examples, max_length, seed)
    return [row for example in examples for row in pack([example], len(example.input_ids))]


class LengthGroupedSampler(Sampler[int]):
    """Samples rows in random order, such that the rows of a batch have similar lengths.

    The order depends only on seed and epoch, so that a resumed run sees the same batches as an uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}-{self._epoch}-order")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        size = self._batch_size
        rest = len(order) % size
        # The incomplete batch must be last, since the data loader cuts the indices into batches by counting.
        full, last = order[: len(order) - rest], order[len(order) - rest :]
        group = size * SORTED_BATCHES
        batches = []
        for start in range(0, len(full), group):
            by_length = sorted(full[start : start + group], key=lambda row: self._lengths[row])
            batches += [by_length[place : place + size] for place in range(0, len(by_length), size)]
        rng.shuffle(batches)
        return iter([row for batch in batches for row in batch] + last)


def sorted_batches(rows: Sequence[PackedRow], batch_size: int) -> list[list[PackedRow]]:
    """Return all rows in batches, sorted by length, for evaluation."""
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
