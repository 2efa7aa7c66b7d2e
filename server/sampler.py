"""Per-row sampling: each request's own parameters, penalties and generator, many rows at once.

The order is the usual one: penalties and bias on the logits, temperature, then top-k, top-p and min-p. A token is drawn
by inverting the distribution at one uniform number from the request's own generator, so a draw depends on nothing but
the request: not on the batch, the device's random state or a preemption.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.sequence import SamplingParams, Sequence

CANDIDATES = 256
"""Rows with top-p or min-p look at this many tokens first; sorting the whole vocabulary is 100 times dearer."""


GREEDY = 1e-5
"""Temperatures below this one are taken for 0: divided by them, logits overflow."""


def row_peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit, NaN if it has one, and a token that has it."""
    peak, token = logits.max(dim=-1)
    return peak, token


def sample(
    logits: Tensor, sequences: Seq[Sequence], peaks: Callable[[Tensor], tuple[Tensor, Tensor]] = row_peaks
) -> list[int | None]:
    """One token id per row of ``logits`` [rows, vocabulary] float32, or None where a row is not finite.

    Changes ``logits`` in place. peaks: as :func:`row_peaks`.
    """
    if not sequences:
        return []
    peak, greedy = peaks(logits)
    finite = peak.isfinite().tolist()
    adjusted = [row for row, s in enumerate(sequences) if finite[row] and adjust(logits[row], s)]
    if adjusted:
        greedy[adjusted] = logits[adjusted].argmax(-1)
    tokens: list[int | None] = [token if ok else None for token, ok in zip(greedy.tolist(), finite, strict=True)]
    drawn = [row for row, s in enumerate(sequences) if finite[row] and s.sampling.temperature >= GREEDY]
    if drawn:
        params = [sequences[row].sampling for row in drawn]
        picks = draw(logits[drawn], params, [sequences[row].rng.random() for row in drawn])
        for row, token in zip(drawn, picks, strict=True):
            tokens[row] = token
    return tokens


def adjust(logits: Tensor, sequence: Sequence) -> bool:
    """Apply penalties and bias to one row [vocabulary] in place; False if the request has none."""
    p = sequence.sampling
    changed = False
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        changed = True
    if (p.presence_penalty or p.frequency_penalty) and sequence.output_length:
        counts = Counter(sequence.output)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * times
        changed = True
    if p.logit_bias:
        biased, bias = zip(*p.logit_bias, strict=True)
        logits[list(biased)] += torch.tensor(bias, device=logits.device, dtype=logits.dtype)
        changed = True
    return changed


def draw(logits: Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> list[int]:
    """Draw one token per row of ``logits`` [rows, vocabulary], all with a temperature above 0."""
    u = torch.tensor(uniforms, device=logits.device, dtype=torch.float64)
    probs = torch.softmax(logits / _column(logits, [p.temperature for p in params]), dim=-1)
    plain = [row for row, p in enumerate(params) if p.top_p >= 1 and not p.top_k and not p.min_p]
    cut = [row for row in range(len(params)) if row not in set(plain)]
    tokens = [0] * len(params)
    if plain:
        for row, token in zip(plain, _invert(probs[plain], u[plain]).tolist(), strict=True):
            tokens[row] = token
    width = CANDIDATES
    while cut:
        width = min(width, probs.shape[-1])
        picked, covered = _draw_cut(probs[cut], [params[row] for row in cut], u[cut], width)
        for row, token in zip(cut, picked, strict=True):
            tokens[row] = token
        cut = [row for row, enough in zip(cut, covered, strict=True) if not enough and width < probs.shape[-1]]
        width = probs.shape[-1]
    return tokens


def _draw_cut(probs: Tensor, params: Seq[SamplingParams], u: Tensor, width: int) -> tuple[list[int], list[bool]]:
    """Draw among the ``width`` likeliest tokens of each row, and say whether those hold all that the cuts keep."""
    p, ids = probs.topk(width, dim=-1)
    everything = probs.shape[-1]
    top_k = _column(p, [min(q.top_k or everything, everything) for q in params])
    top_p = _column(p, [q.top_p for q in params])
    min_p = _column(p, [q.min_p for q in params])
    p = p.masked_fill(torch.arange(width, device=p.device) >= top_k, 0)
    below = p.cumsum(-1)
    mass = torch.where(top_k <= width, below[:, -1:], 1.0)
    enough = (below[:, -1:] >= top_p) & (top_p < 1) | (p[:, -1:] < min_p * p[:, :1])
    covered = (top_k <= width) | (top_k == everything) & enough
    kept = p.masked_fill((below - p >= top_p * mass) & (top_p < 1) | (p < min_p * p[:, :1]), 0)
    picked = ids.gather(-1, _invert(kept, u).unsqueeze(-1)).squeeze(-1)
    return picked.tolist(), covered.squeeze(-1).tolist()


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The index at which each row's cumulative weight passes ``u`` [rows] of its total: [rows]. Never a zero weight."""
    cumulative = weights.double().cumsum(-1)
    index = torch.searchsorted(cumulative, (u * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    last = (weights > 0).double().cumsum(-1).argmax(-1)
    return torch.minimum(index, last)


def _column(like: Tensor, values: Seq[float]) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).unsqueeze(-1)
