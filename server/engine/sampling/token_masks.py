"""Masks of the tokens that grammars allow, for the rows of a step. A thread makes them while the step runs.

A mask is a row of 0 and -inf that is added to the logits: torch adds a row in a seventh of the time in which it fills
one by a bool mask. The same masks come again and again (inside a string, after a key), so they are kept.
"""

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from bases import machine
from server.engine.grammar import GrammarFailure
from server.engine.sequence import Batch, SampledRow

MAX_KEPT = 128
"""Masks that are kept, of 4 bytes for each token id; the least recently used are dropped first."""
_WORD = 32
"""Bits of the words that llguidance's masks consist of."""
_VALUES = np.array([-np.inf, 0], np.float32)
"""What is added to the logit of a token by its bit."""


@dataclass(frozen=True)
class TokenMasks:
    """The masks of a step."""

    rows: list[int]
    """Rows of the logits that have one."""
    masks: list[Tensor]
    """One for each of ``rows``: [token ids of a grammar] float32, 0 or -inf, on the host."""
    failures: dict[int, GrammarFailure]
    """Of ``rows``, those whose mask says nothing because a limit is met."""

    def apply(self, logits: Tensor) -> None:
        """Make the logits [all rows, vocabulary] of tokens that may not be sampled -inf, in place. NaN stays NaN."""
        masks = self.masks if logits.device.type == "cpu" else torch.stack(self.masks).to(logits.device)
        for row, mask in zip(self.rows, masks, strict=True):
            logits[row].add_(mask[: logits.shape[-1]])


class MaskWorker:
    """The thread that makes masks."""

    def __init__(self) -> None:
        cpus = machine.cpu_affinity()  # the engine's thread, which starts the worker, may be bound to one
        self._worker = ThreadPoolExecutor(1, "token-masks", os.sched_setaffinity, (0, cpus))
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        """Bits -> mask. For the thread."""

    def start(self, batch: Batch) -> "Future[TokenMasks] | None":
        """Begin to make the masks of a step; None if it needs none. The sequences must not change meanwhile."""
        if not any(chunk.sequence.matcher for chunk in batch.chunks):
            return None
        wanted = [(row, sampled) for row, sampled in enumerate(batch.sampled) if sampled.sequence.matcher]
        return self._worker.submit(self._try_make, wanted) if wanted else None

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()

    def _try_make(self, wanted: list[tuple[int, SampledRow]]) -> TokenMasks:
        try:
            return self._make(wanted)
        except Exception:
            raise
        except BaseException as panic:  # a panic of a Rust library is no Exception, and would end the engine
            raise RuntimeError(f"a grammar's mask could not be made: {panic!r}") from panic

    def _make(self, wanted: list[tuple[int, SampledRow]]) -> TokenMasks:
        rows = [row for row, _ in wanted]
        bits, failures = _bits([sampled for _, sampled in wanted])
        return TokenMasks(rows, list(map(self._mask, bits)), {rows[at]: why for at, why in failures.items()})

    def _mask(self, bits: np.ndarray) -> Tensor:
        key = bits.tobytes()
        mask = self._kept.get(key)
        if mask is None:
            mask = torch.from_numpy(_VALUES[np.unpackbits(bits.view(np.uint8), bitorder="little")])
            self._kept[key] = mask
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return mask


def _bits(sampled: list[SampledRow]) -> tuple[np.ndarray, dict[int, GrammarFailure]]:
    """A bit for each row and token id, [rows, words] int32: whether the token may be sampled. And rows without."""
    vocabulary = max(row.sequence.matcher.grammar.vocabulary for row in sampled if row.sequence.matcher)
    bits = np.full((len(sampled), -(-vocabulary // _WORD)), -1, np.int32)
    failures: dict[int, GrammarFailure] = {}
    done = 0
    for _, group in groupby(sampled, key=lambda row: id(row.sequence)):
        rows = list(group)  # the last one has all drafts
        if matcher := rows[0].sequence.matcher:
            failed = matcher.write_masks(rows[-1].drafts, bits[done:].ctypes.data, bits[0].nbytes)
            if failed is not None:
                place, failure = failed
                failures[done + place] = failure
        done += len(rows)
    return bits, failures
