"""Sampling of many rows at once, each with its request's own parameters, penalties and random generator.

The order is the usual one: masks of grammars, penalties, bias and stop tokens that may not come yet, temperature, then
top-k, top-p and min-p. A token is drawn by inverting the cumulative distribution at a uniform number from the request's
generator. So a draw depends on the request alone, and not on the batch, the device's random state or a preemption.

On CUDA only the end waits for the device: parameters are sent in at most two copies, and results come back in one.
"""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from server.compute.backend import SamplingOps
from server.compute.reference.sampling import invert
from server.compute.transfer import to_device
from server.engine.sampling.token_masks import TokenMasks
from server.engine.sequence import SampledRow, SamplingParams

CANDIDATES = 256
"""Rows with top-p or min-p first use this many most likely tokens: sorting the vocabulary takes 100 times as long."""


MIN_TEMPERATURE = 1e-5
"""Lower temperatures mean greedy: logits divided by them would overflow."""


def sample(
    logits: Tensor, sampled: Seq[SampledRow], ops: SamplingOps, masks: TokenMasks | None = None
) -> list[int | None]:
    """Sample a token id for each row of ``logits`` [rows, vocabulary] float32; None for a row that is not finite.

    Changes ``logits`` in place. Results are read from the device once, and again if a row's filters keep more than
    CANDIDATES tokens. Which rows are finite is known only after drawing.
    """
    if not sampled:
        return []
    if masks is not None:
        masks.apply(logits)
    peak, greedy = ops.row_peaks(logits)
    adjusted = apply_penalties(logits, sampled)
    if adjusted is not None:
        greedy[adjusted] = logits[adjusted].argmax(-1)
    rows = [row for row, s in enumerate(sampled) if s.sequence.sampling.temperature >= MIN_TEMPERATURE]
    draws = _draws(logits, sampled, rows, ops) if rows else None
    count = len(sampled)
    found = torch.cat([peak.isfinite(), greedy, *(draws.draw() if draws else ())]).tolist()
    finite, tokens = found[:count], found[count : 2 * count]
    for row, token in draws.resolve(found[2 * count :], finite).items() if draws else ():
        tokens[row] = token
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def apply_penalties(logits: Tensor, sampled: Seq[SampledRow]) -> Tensor | None:
    """Apply penalties and bias to ``logits`` in place. Returns the rows that have any, [count] int64, or None."""
    vocabulary = logits.shape[-1]
    rows = [row for row, s in enumerate(sampled) if _has_penalties(s)]
    if not rows:
        return None
    penalised = [_penalties(sampled[row], row * vocabulary) for row in rows]
    kinds = [np.concatenate(kind, axis=1) for kind in zip(*penalised, strict=True)]
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


def changes_logits(row: SampledRow) -> bool:
    """Whether :func:`sample` changes the logits of a row."""
    return row.sequence.matcher is not None or _has_penalties(row)


def _may_not_stop(row: SampledRow) -> bool:
    """Whether the answer has too few tokens to end."""
    p = row.sequence.sampling
    return bool(p.stop_token_ids) and row.sequence.output_length + len(row.drafts) < p.min_tokens


def _has_penalties(row: SampledRow) -> bool:
    p = row.sequence.sampling
    used = bool(p.presence_penalty or p.frequency_penalty) and (row.sequence.output_length > 0 or bool(row.drafts))
    return p.repetition_penalty != 1.0 or used or bool(p.logit_bias) or _may_not_stop(row)


def _penalties(row: SampledRow, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens with a repetition penalty, with a presence or frequency penalty, and with a bias: each [2, any] float64.

    The first row of each has their positions in the flat logits, where those of ``row`` begin at ``start``; the second
    what to divide by, to subtract and to add.
    """
    sequence, p = row.sequence, row.sequence.sampling
    seen = dict.fromkeys((*sequence.tokens, *row.drafts) if p.repetition_penalty != 1.0 else (), p.repetition_penalty)
    counts = Counter((*sequence.output, *row.drafts) if p.presence_penalty or p.frequency_penalty else ())
    bias = dict(p.logit_bias) | dict.fromkeys(p.stop_token_ids if _may_not_stop(row) else (), -inf)
    repeated, used, biased = (_columns(numbers, start) for numbers in (seen, counts, bias))
    # in float32, like the logits: float64 would round differently
    used[1] = np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * used[1].astype(np.float32)
    return repeated, used, biased


def _columns(numbers: Mapping[int, float], start: int) -> np.ndarray:
    return np.array([[start + token for token in numbers], list(numbers.values())], dtype=np.float64)


@dataclass(frozen=True)
class _Draws:
    """Parameters of the rows of a batch that are drawn, on the device. A filter is top-k, top-p or min-p."""

    rows: list[int]
    """Rows of the batch; those without filters come first."""
    unfiltered: int
    """Number of rows without filters."""
    logits: Tensor
    """[rows, vocabulary] float32."""
    temperatures: Tensor
    """[rows] float32."""
    u: Tensor
    """[rows] float64: the uniform numbers."""
    filters: Tensor
    """[3, rows] float64: top-k, top-p, min-p."""
    ops: SamplingOps

    def draw(self) -> list[Tensor]:
        """Draw a token for each row; for filtered rows also whether the candidates held all tokens that they keep."""
        count = self.unfiltered
        drawn = [self.ops.draw_rows(self.logits[:count], self.temperatures[:count], self.u[:count])] if count else []
        filtered = self._draw_filtered(slice(count, None), self._width) if count < len(self.rows) else ()
        return [*drawn, *filtered]

    def resolve(self, found: Seq[int], finite: Seq[int]) -> dict[int, int]:
        """Return row -> token, given the results of :meth:`draw` on the host. Draws some rows again if needed."""
        tokens = dict(zip(self.rows, found, strict=False))
        filtered, covered = self.rows[self.unfiltered :], found[len(self.rows) :]
        short = [
            at for at, (row, enough) in enumerate(zip(filtered, covered, strict=True)) if finite[row] and not enough
        ]
        if short and self._width < self.logits.shape[1]:
            again, _ = self._draw_filtered(to_device(short, self.logits.device) + self.unfiltered, self.logits.shape[1])
            tokens |= zip((filtered[i] for i in short), again.tolist(), strict=True)
        return tokens

    @property
    def _width(self) -> int:
        return min(CANDIDATES, self.logits.shape[1])

    def _draw_filtered(self, at: slice | Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Draw among the ``width`` most likely tokens. Returns tokens, and whether the filters keep no others."""
        top_k, top_p, min_p = self.filters[:, at].float().unsqueeze(-1)
        p, ids = self.ops.top_rows(self.logits[at], self.temperatures[at], width)
        p = p.masked_fill(torch.arange(width, device=p.device) >= top_k, 0)
        below = p.cumsum(-1)
        mass = below[:, -1:].masked_fill(top_k > width, 1.0)
        enough = (below[:, -1:] >= top_p) & (top_p < 1) | (p[:, -1:] < min_p * p[:, :1])
        covered = (top_k <= width) | (top_k == self.logits.shape[1]) & enough
        kept = p.masked_fill((below - p >= top_p * mass) & (top_p < 1) | (p < min_p * p[:, :1]), 0)
        picked = ids.gather(-1, invert(kept, self.u[at]).unsqueeze(-1)).squeeze(-1)
        return picked, covered.squeeze(-1)


def _draws(logits: Tensor, sampled: Seq[SampledRow], rows: list[int], ops: SamplingOps) -> _Draws:
    """Prepare the draws of ``rows``, none of them greedy, each by its own number."""
    everything = logits.shape[-1]
    rows = sorted(rows, key=lambda row: _is_filtered(sampled[row].sequence.sampling))
    params = [sampled[row].sequence.sampling for row in rows]
    numbers = [
        [*rows],
        [p.temperature for p in params],
        [sampled[row].sequence.uniform(ahead=len(sampled[row].drafts)) for row in rows],
        [min(p.top_k or everything, everything) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    sent = to_device(numbers, logits.device, torch.float64)
    chosen = logits if rows == [*range(len(logits))] else logits[sent[0].long()]
    return _Draws(rows, sum(not _is_filtered(p) for p in params), chosen, sent[1].float(), sent[2], sent[3:], ops)


def _is_filtered(p: SamplingParams) -> bool:
    return p.top_p < 1 or bool(p.top_k) or bool(p.min_p)
