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
from torch import Tensor, nn

from bases.errors import ConfigError
from training.data.rendering import UNTRAINED, Example

MAX_LEAK = 1e-4
"""Of the logits' norm: what another example before it may change of an example's, for rounding."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Examples one after the other; the three lists are equally long."""

    input_ids: list[int]
    labels: list[int]
    """No example's first token is trained (see Example), so none is foretold from the example before."""
    position_ids: list[int]
    examples: tuple[Example, ...]


def pack(examples: Sequence[Example], max_length: int, seed: int = 0) -> list[PackedRow]:
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


def _join(examples: Sequence[Example]) -> PackedRow:
    return PackedRow(
        [token for example in examples for token in example.input_ids],
        [label for example in examples for label in example.labels],
        [position for example in examples for position in range(len(example.input_ids))],
        tuple(examples),
    )


def collate(rows: Sequence[PackedRow], pad: int) -> dict[str, Any]:
    """A batch for the model: ``input_ids``, ``labels``, ``position_ids`` [rows, longest] int64; no cache, no mask."""
    longest = max(len(row.input_ids) for row in rows)
    fill = [longest - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.input_ids + [pad] * n for row, n in zip(rows, fill, strict=True)]),
        "labels": torch.tensor([row.labels + [UNTRAINED] * n for row, n in zip(rows, fill, strict=True)]),
        "position_ids": torch.tensor([[*row.position_ids, *range(n)] for row, n in zip(rows, fill, strict=True)]),
        "use_cache": False,
    }


@torch.no_grad()
def check_borders(model: nn.Module) -> None:
    """Raises ConfigError where an example sees the one before it: not every model hands its position ids on."""
    first, other = (_logits_after(model, token) for token in (1, 2))
    if (first - other).norm() > MAX_LEAK * first.norm():
        raise ConfigError("--packing: this base lets an example see the one before it in its row; leave it out")


def _logits_after(model: nn.Module, token: int) -> Tensor:
    """Of a short example, behind one of ``token`` alone; float32 [tokens, vocabulary]."""
    row = [Example([token] * 4, [UNTRAINED] * 4, "", 0, ""), Example([3, 4, 5, 6], [UNTRAINED] * 4, "", 0, "")]
    batch = {name: value for name, value in collate([_join(row)], 0).items() if name != "labels"}
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    logits: Tensor = model(**moved).logits
    return logits[0, 4:].float()
