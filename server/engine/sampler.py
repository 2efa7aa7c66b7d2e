"""Per-row sampling: each request's own parameters, penalties and generator, many rows at once.

The order is the usual one: penalties and bias on the logits, temperature, then top-k, top-p and min-p. A token is drawn
by inverting the distribution at one uniform number from the request's own generator, so a draw depends on nothing but
the request: not on the batch, the device's random state or a preemption.

On CUDA nothing here waits for the device but the end: numbers go there in two copies at most, and all that the host
wants to know comes back in one.
"""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.compute.backend import SamplingOps
from server.compute.reference.sampling import invert
from server.compute.transfer import to_device
from server.engine.sequence import SamplingParams, Sequence

CANDIDATES = 256
"""Rows with top-p or min-p look at this many tokens first; sorting the whole vocabulary is 100 times dearer."""


GREEDY = 1e-5
"""Temperatures below this one are taken for 0: divided by them, logits overflow."""


def sample(logits: Tensor, sequences: Seq[Sequence], ops: SamplingOps) -> list[int | None]:
    """One token id per row of ``logits`` [rows, vocabulary] float32, or None where a row is not finite.

    Changes ``logits`` in place. The device is read once, and a second time where
    CANDIDATES tokens are not all that a row's cuts keep. Which rows are finite is only known then: the others are drawn
    like any, and their generators move on, which nobody sees, since their requests end.
    """
    if not sequences:
        return []
    peak, greedy = ops.row_peaks(logits)
    adjusted = adjust(logits, sequences)
    if adjusted is not None:
        greedy[adjusted] = logits[adjusted].argmax(-1)
    rows = [row for row, s in enumerate(sequences) if s.sampling.temperature >= GREEDY]
    draws = _draws(logits, sequences, rows, ops) if rows else None
    count = len(sequences)
    found = torch.cat([peak.isfinite(), greedy, *(draws.first() if draws else ())]).tolist()
    finite, tokens = found[:count], found[count : 2 * count]
    for row, token in draws.settled(found[2 * count :], finite).items() if draws else ():
        tokens[row] = token
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def adjust(logits: Tensor, sequences: Seq[Sequence]) -> Tensor | None:
    """Apply penalties and bias to ``logits`` in place. Gives the rows [any] that have some; None where none has."""
    vocabulary = logits.shape[-1]
    rows = [row for row, s in enumerate(sequences) if _is_adjusted(s)]
    if not rows:
        return None
    changes = [_changes(sequences[row], row * vocabulary) for row in rows]
    kinds = [np.concatenate(kind, axis=1) for kind in zip(*changes, strict=True)]
    everything = np.concatenate([*kinds, np.array([rows, rows])], axis=1)
    places, numbers = to_device(everything, logits.device).unbind()
    lengths = [*(kind.shape[1] for kind in kinds), len(rows)]
    parts: list[Tensor] = places.long().split(lengths)
    repeated, used, biased, adjusted = parts
    penalties, amounts, bias, _ = numbers.float().split(lengths)
    flat = logits.view(-1)
    if len(repeated):
        values = flat[repeated]
        flat[repeated] = torch.where(values > 0, values / penalties, values * penalties)
    if len(used):
        flat[used] -= amounts
    if len(biased):
        flat[biased] += bias
    return adjusted


def _is_adjusted(sequence: Sequence) -> bool:
    p = sequence.sampling
    used = bool(p.presence_penalty or p.frequency_penalty) and sequence.output_length > 0
    return p.repetition_penalty != 1.0 or used or bool(p.logit_bias)


def _changes(sequence: Sequence, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that are penalised as repeated, penalised as used, and biased, each [2, any] float64.

    Above their places, from ``start`` on; below what to divide by, to subtract and to add.
    """
    p = sequence.sampling
    seen = dict.fromkeys(sequence.tokens if p.repetition_penalty != 1.0 else (), p.repetition_penalty)
    counts = Counter(sequence.output if p.presence_penalty or p.frequency_penalty else ())
    repeated, used, biased = (_columns(numbers, start) for numbers in (seen, counts, dict(p.logit_bias)))
    # in float32, as logits are: a double would round otherwise
    used[1] = np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * used[1].astype(np.float32)
    return repeated, used, biased


def _columns(numbers: Mapping[int, float], start: int) -> np.ndarray:
    return np.array([[start + token for token in numbers], list(numbers.values())], dtype=np.float64)


@dataclass(frozen=True)
class _Draws:
    """Draws for some rows of a batch, on the device."""

    rows: list[int]
    """Those without cuts first."""
    plain: int
    """How many have none."""
    logits: Tensor
    """[rows, vocabulary] float32."""
    temperatures: Tensor
    """[rows] float32."""
    u: Tensor
    """[rows] float64: where each distribution is inverted."""
    cuts: Tensor
    """[3, rows] float64: top-k, top-p, min-p."""
    ops: SamplingOps

    def first(self) -> list[Tensor]:
        """A token for each row, and for rows with cuts whether it was drawn among all that they keep."""
        plain = slice(None, self.plain)
        drawn = self.ops.draw_rows(self.logits[plain], self.temperatures[plain], self.u[plain]) if self.plain else None
        cut = self._draw_cut(slice(self.plain, None), self._width) if self.plain < len(self.rows) else ()
        return [*cut] if drawn is None else [drawn, *cut]

    def settled(self, found: Seq[int], finite: Seq[int]) -> dict[int, int]:
        """The token of each row of the batch, given what :meth:`first` gave, on the host."""
        tokens = dict(zip(self.rows, found, strict=False))
        cut, covered = self.rows[self.plain :], found[len(self.rows) :]
        short = [at for at, (row, enough) in enumerate(zip(cut, covered, strict=True)) if finite[row] and not enough]
        if short and self._width < self.logits.shape[1]:
            again, _ = self._draw_cut(to_device(short, self.logits.device) + self.plain, self.logits.shape[1])
            tokens |= zip((cut[i] for i in short), again.tolist(), strict=True)
        return tokens

    @property
    def _width(self) -> int:
        return min(CANDIDATES, self.logits.shape[1])

    def _draw_cut(self, at: slice | Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Draw among the ``width`` likeliest of some rows: tokens, and whether those are all that it keeps."""
        top_k, top_p, min_p = self.cuts[:, at].float().unsqueeze(-1)
        p, ids = self.ops.top_rows(self.logits[at], self.temperatures[at], width)
        p = p.masked_fill(torch.arange(width, device=p.device) >= top_k, 0)
        below = p.cumsum(-1)
        mass = below[:, -1:].masked_fill(top_k > width, 1.0)
        enough = (below[:, -1:] >= top_p) & (top_p < 1) | (p[:, -1:] < min_p * p[:, :1])
        covered = (top_k <= width) | (top_k == self.logits.shape[1]) & enough
        kept = p.masked_fill((below - p >= top_p * mass) & (top_p < 1) | (p < min_p * p[:, :1]), 0)
        picked = ids.gather(-1, invert(kept, self.u[at]).unsqueeze(-1)).squeeze(-1)
        return picked, covered.squeeze(-1)


def _draws(logits: Tensor, sequences: Seq[Sequence], rows: list[int], ops: SamplingOps) -> _Draws:
    """For ``rows``, all with a temperature above 0. Takes a number from the generator of each."""
    everything = logits.shape[-1]
    rows = sorted(rows, key=lambda row: _is_cut(sequences[row].sampling))
    params = [sequences[row].sampling for row in rows]
    numbers = [
        [*rows],
        [p.temperature for p in params],
        [sequences[row].rng.random() for row in rows],
        [min(p.top_k or everything, everything) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    sent = to_device(numbers, logits.device, torch.float64)
    chosen = logits if rows == [*range(len(logits))] else logits[sent[0].long()]
    return _Draws(rows, sum(not _is_cut(p) for p in params), chosen, sent[1].float(), sent[2], sent[3:], ops)


def _is_cut(p: SamplingParams) -> bool:
    return p.top_p < 1 or bool(p.top_k) or bool(p.min_p)
