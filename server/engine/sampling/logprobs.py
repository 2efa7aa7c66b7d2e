"""Log probabilities of sampled tokens and of prompts, from the model's raw logits.

They are taken before penalties, bias, masks and temperature, which change logits in place: rows whose sequences ask are
copied first, unless none changes. A row's numbers do not depend on the other rows.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from math import isnan

import torch
from torch import Tensor

from server.compute.backend import SamplingOps
from server.compute.transfer import to_device
from server.engine.sampling.sampler import changes_logits
from server.engine.sequence import Chunk, SampledRow, TokenLogprobs

ROWS = 64
"""Rows of logits that are scored together: some backends need as much memory again as several copies of them."""


class RawLogits:
    """The logits of the sampled rows whose sequences ask for log probabilities, as they were before sampling."""

    def __init__(self, logits: Tensor, sampled: Seq[SampledRow]) -> None:
        """``logits`` [rows of ``sampled``, vocabulary] float32. Copies them unless sampling leaves them as they are."""
        self._sampled = sampled
        self._rows = [i for i, row in enumerate(sampled) if row.sequence.sampling.logprobs is not None]
        if len(self._rows) == len(sampled) and not any(map(changes_logits, sampled)):
            self._logits = logits
        elif self._rows:
            self._logits = logits[to_device(self._rows, logits.device)]

    def score(self, tokens: Seq[int | None], ops: SamplingOps) -> list[TokenLogprobs | None]:
        """Those of ``tokens``, one for each sampled row; None where none are asked for. Empty if none are at all."""
        if not self._rows:
            return []
        asked = [self._sampled[row].sequence.sampling.logprobs or 0 for row in self._rows]
        scores = score(self._logits, [tokens[row] or 0 for row in self._rows], asked, ops)
        found: list[TokenLogprobs | None] = [None] * len(tokens)
        for row, logprobs in zip(self._rows, scores, strict=True):
            found[row] = logprobs
        return found


def score_prompts(logits: Tensor, chunks: Seq[Chunk], ops: SamplingOps) -> list[list[TokenLogprobs] | None]:
    """For each chunk, those of the tokens after its ``read`` positions; None if one is not finite.

    ``logits`` [rows of all of them, vocabulary] float32.
    """
    followers = [chunk.sequence.tokens[position + 1] for chunk in chunks for position in chunk.read]
    asked = [chunk.sequence.prompt_logprobs or 0 for chunk in chunks for _ in chunk.read]
    scores = iter(score(logits, followers, asked, ops))
    rows = (list(islice(scores, len(chunk.read))) for chunk in chunks)
    return [None if None in found else [one for one in found if one] for found in rows]


def score(logits: Tensor, tokens: Seq[int], asked: Seq[int], ops: SamplingOps) -> list[TokenLogprobs | None]:
    """The log probability of a token in each row of ``logits`` [rows, vocabulary] float32; None if it is not finite.

    ``asked``: how many of the most likely tokens to return for each row.
    """
    return [found for start in range(0, len(tokens), ROWS) for found in _score(logits, tokens, asked, start, ops)]


def _score(
    logits: Tensor, tokens: Seq[int], asked: Seq[int], start: int, ops: SamplingOps
) -> Iterator[TokenLogprobs | None]:
    rows = slice(start, start + ROWS)
    width = min(max(asked[rows]), logits.shape[1])
    scores = ops.score_rows(logits[rows], to_device(tokens[rows], logits.device), width)
    numbers = (scores.logprobs.unsqueeze(-1), scores.ranks.unsqueeze(-1), scores.top, scores.likely)
    read = torch.cat([part.double() for part in numbers], dim=-1).tolist()  # exact, and one copy from the device
    for (logprob, rank, *others), most in zip(read, asked[rows], strict=True):
        count = min(most, width)
        top, likely = others[:count], map(int, others[width : width + count])
        found = TokenLogprobs(logprob, int(rank), tuple(zip(likely, top, strict=True)))
        yield None if isnan(logprob) else found
