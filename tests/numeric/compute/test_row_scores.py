"""Log probabilities, ranks and the likeliest tokens of rows of logits: the kernel, torch, and the definition."""

import pytest
import torch
from torch import Tensor

from server.compute.backend import RowScores
from server.compute.cpu.kernels import Kernels
from server.compute.reference.sampling import TorchSampling
from tests.numeric.kernels import runnable

pytestmark = pytest.mark.usefixtures("two_threads")


def rows(vocabulary: int) -> Tensor:
    """Logits [9, vocabulary] from flat to peaked, with ties, both zeros and impossible tokens."""
    torch.manual_seed(0)
    logits = torch.randn(9, vocabulary) * torch.tensor([0.0, 0.1, 1, 3, 10, 30, 3, 3, 3]).unsqueeze(-1)
    logits[6] = logits[6].round()
    logits[7, : vocabulary // 2] = -torch.inf
    logits[8, ::2], logits[8, 1::2] = 0.0, -0.0
    return logits


def check(found: RowScores, logits: Tensor, tokens: Tensor, width: int) -> None:
    """Compare with float64, and with a sort that keeps equal logits in the order of their ids."""
    expected = logits.double().log_softmax(-1)
    own = logits.gather(-1, tokens.unsqueeze(-1))
    likely = logits.argsort(dim=-1, descending=True, stable=True)[:, :width]
    assert found.ranks.tolist() == [1 + int((row > one).sum()) for row, one in zip(logits, own, strict=True)]
    assert torch.equal(found.likely, likely)
    assert found.logprobs.dtype == found.top.dtype == torch.float32
    near = {"rtol": 1e-6, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(found.logprobs, expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), **near)
    torch.testing.assert_close(found.top, expected.gather(-1, likely), **near)


@pytest.mark.parametrize(("vocabulary", "width"), [(1, 1), (64, 64), (300, 0), (5003, 20), (40_000, 64)])
def test_scores_are_those_of_the_definition(vocabulary: int, width: int, kernels: Kernels) -> None:
    logits = rows(vocabulary)
    for tokens in (logits.argmax(-1), torch.randint(vocabulary, (9,)), torch.full((9,), vocabulary - 1)):
        check(kernels.score_rows(logits, tokens, width), logits, tokens, width)
        check(TorchSampling().score_rows(logits, tokens, width), logits, tokens, width)


def test_rows_that_are_not_finite_are_marked(kernels: Kernels) -> None:
    logits = torch.randn(5, 1000)
    logits[0, 5], logits[1], logits[2], logits[3, 7] = torch.nan, -torch.inf, torch.nan, torch.inf
    tokens = torch.tensor([5, 6, 7, 7, 9])
    for ops in (kernels, TorchSampling()):
        for given in (tokens, tokens + 1):
            scores = ops.score_rows(logits, given, 3)
            assert scores.logprobs.isnan().tolist() == [True] * 4 + [False]
            assert ((scores.likely >= 0) & (scores.likely < 1000)).all()


def test_a_row_has_the_same_bits_in_every_batch_and_on_every_processor() -> None:
    logits = rows(5003)
    tokens = torch.arange(9) * 500
    first, *others = runnable()
    together = first.score_rows(logits, tokens, 20)
    for row in range(9):
        alone = first.score_rows(logits[row : row + 1], tokens[row : row + 1], 20)
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True))
    for kernels in others:
        scores = kernels.score_rows(logits, tokens, 20)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(scores, together, strict=True)), kernels.variant
