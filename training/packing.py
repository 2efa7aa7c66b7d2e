"""Several examples in one row, without any seeing another.

Position ids begin again at 0 with each example. From that alone transformers (5.23, ``masking_utils``) finds the
borders and builds a block-diagonal mask, for every attention it has, as long as it gets no attention mask and keeps
no cache. So a packed batch carries neither: what fills a row up is one more example, of which nothing is trained.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.rendering import UNTRAINED, Example


@dataclass(frozen=True, slots=True)
class Packed:
    """Examples one after the other; the three lists are equally long."""

    input_ids: list[int]
    labels: list[int]
    """No example's first token is trained (see Example), so none is foretold from the example before."""
    position_ids: list[int]
    examples: tuple[Example, ...]


def pack(examples: Sequence[Example], max_length: int, seed: int = 0) -> list[Packed]:
    """Rows of at most ``max_length`` tokens: the longest example first, each into the fullest row that has room.

    (Best fit decreasing.) The order of the rows is random. No example may be longer than ``max_length``.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []
    """(tokens left, row), in order."""
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        length = len(example.input_ids)
        if length > max_length:
            raise ValueError(f"{example.source} has {length} tokens, more than {max_length}")
        place = bisect_left(room, (length, 0))
        if place == len(room):
            room.append((max_length, len(rows)))
            rows.append([])
        left, row = room.pop(place)
        rows[row].append(example)
        insort(room, (left - length, row))
    random.Random(f"{seed}-packing").shuffle(rows)
    return [_join(row) for row in rows]


def _join(examples: Sequence[Example]) -> Packed:
    return Packed(
        [token for example in examples for token in example.input_ids],
        [label for example in examples for label in example.labels],
        [position for example in examples for position in range(len(example.input_ids))],
        tuple(examples),
    )


def collate(rows: Sequence[Packed], pad: int) -> dict[str, Any]:
    """A batch for the model: ``input_ids``, ``labels``, ``position_ids`` [rows, longest] int64; no cache, no mask."""
    longest = max(len(row.input_ids) for row in rows)
    fill = [longest - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.input_ids + [pad] * n for row, n in zip(rows, fill, strict=True)]),
        "labels": torch.tensor([row.labels + [UNTRAINED] * n for row, n in zip(rows, fill, strict=True)]),
        "position_ids": torch.tensor([[*row.position_ids, *range(n)] for row, n in zip(rows, fill, strict=True)]),
        "use_cache": False,
    }
