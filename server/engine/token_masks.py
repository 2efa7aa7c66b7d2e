"""Masks of the tokens that grammars allow, for the rows of a step. A thread makes them while the step runs."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from bases import machine
from server.engine.sequence import Batch, SampledRow

_WORD = 32
"""Bits of the words that llguidance's masks consist of."""


@dataclass(frozen=True)
class TokenMasks:
    """The masks of a step."""

    rows: list[int]
    """Rows of the logits that have one."""
    forbidden: Tensor
    """[rows, token ids of a grammar] bool, on the host."""

    def apply(self, logits: Tensor) -> None:
        """Set the logits [all rows, vocabulary] of the tokens that may not be sampled to -inf, in place."""
        forbidden = self.forbidden[:, : logits.shape[-1]]
        if logits.device.type == "cuda":
            forbidden = forbidden.pin_memory().to(logits.device, non_blocking=True)
        for row, mask in zip(self.rows, forbidden, strict=True):
            logits[row].masked_fill_(mask, -torch.inf)


class MaskWorker:
    """The thread that makes masks."""

    def __init__(self) -> None:
        cpus = machine.cpu_affinity()  # the engine's thread, which starts the worker, may be bound to one
        self._worker = ThreadPoolExecutor(1, "token-masks", os.sched_setaffinity, (0, cpus))

    def start(self, batch: Batch) -> "Future[TokenMasks] | None":
        """Begin to make the masks of a step; None if it needs none. The sequences must not change meanwhile."""
        if not any(chunk.sequence.matcher for chunk in batch.chunks):
            return None
        wanted = [(row, sampled) for row, sampled in enumerate(batch.sampled) if sampled.sequence.matcher]
        return self._worker.submit(_make, wanted) if wanted else None

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()


def _make(wanted: list[tuple[int, SampledRow]]) -> TokenMasks:
    matchers = [sampled.sequence.matcher for _, sampled in wanted]
    words = -(-max(matcher.grammar.vocabulary for matcher in matchers if matcher) // _WORD)
    bits = np.full((len(wanted), words), -1, np.int32)
    size = words * bits.itemsize
    done = 0
    for _, of_sequence in groupby(wanted, key=lambda row: id(row[1].sequence)):
        sampled = [row for _, row in of_sequence]  # the last one has all drafts
        if matcher := sampled[0].sequence.matcher:
            matcher.write_masks(sampled[-1].drafts, bits.ctypes.data + done * size, size)
        done += len(sampled)
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    return TokenMasks([row for row, _ in wanted], torch.from_numpy(allowed) == 0)
