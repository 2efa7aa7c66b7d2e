"""Packs several examples into one row, such that no example attends to another.

Position ids restart at 0 with each example. From them transformers (5.23, ``masking_utils``) builds a
block-diagonal mask for every attention implementation, but only without an attention mask and a cache. So a packed
batch has neither; its padding is one more example, of which no token is trained.
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
"""Largest change, relative to the norm of the logits, that rounding may cause if the preceding example changes."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One or more concatenated examples; the three lists have equal length."""

    input_ids: list[int]
    labels: list[int]
    """The first token of an example is never trained, so no token is predicted from the previous example."""
    position_ids: list[int]
    examples: tuple[Example, ...]


def pack(examples: Sequence[Example], max_length: int, seed: int = 0) -> list[PackedRow]:
    """Pack examples into rows of at most ``max_length`` tokens by best fit decreasing; the order of rows is random.

    Raises ValueError if an example is longer than ``max_length``.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []
    """(free tokens, row index), sorted."""
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
    """Return a batch: ``input_ids``, ``labels``, ``position_ids``, int64 [rows, longest]; no mask, no cache."""
    longest = max(len(row.input_ids) for row in rows)
    fill = [longest - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.input_ids + [pad] * n for row, n in zip(rows, fill, strict=True)]),
        "labels": torch.tensor([row.labels + [UNTRAINED] * n for row, n in zip(rows, fill, strict=True)]),
        "position_ids": torch.tensor([[*row.position_ids, *range(n)] for row, n in zip(rows, fill, strict=True)]),
        "use_cache": False,
    }


@torch.no_grad()
def check_no_leak(model: nn.Module) -> None:
    """Raise ConfigError if an example attends to the one before it, as in models that ignore position ids."""
    first, other = (_logits_after(model, token) for token in (1, 2))
    if (first - other).norm() > MAX_LEAK * first.norm():
        raise ConfigError(
            "--packing: this base lets an example attend to the one before it in its row; train without --packing"
        )


def _logits_after(model: nn.Module, token: int) -> Tensor:
    """Return the logits of a short example packed after one that repeats ``token``; float32 [tokens, vocabulary]."""
    row = [Example([token] * 4, [UNTRAINED] * 4, "", 0, ""), Example([3, 4, 5, 6], [UNTRAINED] * 4, "", 0, "")]
    batch = {name: value for name, value in collate([_join(row)], 0).items() if name != "labels"}
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    logits: Tensor = model(**moved).logits
    return logits[0, 4:].float()
