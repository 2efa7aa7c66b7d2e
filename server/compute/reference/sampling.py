"""The parts of sampling that read whole rows of logits, by torch."""

import torch
from torch import Tensor

from server.compute.backend import RowScores


class TorchSampling:
    """See :class:`server.compute.backend.SamplingOps`. Runs on any device."""

    def row_peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row [rows] float32, and its token [rows] int64."""
        peak, token = logits.max(dim=-1)
        return peak, token

    def draw_rows(self, logits: Tensor, temperatures: Tensor, u: Tensor) -> Tensor:
        """A token for each row [rows] int64."""
        return invert(torch.softmax(logits / temperatures.unsqueeze(-1), dim=-1), u)

    def top_rows(self, logits: Tensor, temperatures: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Probabilities [rows, width] float32, descending, and their tokens [rows, width] int64."""
        probs, tokens = torch.softmax(logits / temperatures.unsqueeze(-1), dim=-1).topk(width, dim=-1)
        return probs, tokens

    def score_rows(self, logits: Tensor, tokens: Tensor, width: int) -> RowScores:
        """In float64, rounded to float32 at the end."""
        own = logits.gather(-1, tokens.unsqueeze(-1))
        total = logits.double().logsumexp(-1, keepdim=True)
        total = total.masked_fill(~total.isfinite(), torch.nan)
        likely = _order(logits).topk(width, dim=-1).indices
        top = (logits.gather(-1, likely) - total).float()
        return RowScores((own - total).float().squeeze(-1), (logits > own).sum(-1) + 1, top, likely)


def _order(logits: Tensor) -> Tensor:
    """Whole numbers [rows, vocabulary] int64, larger for larger logits, and for smaller ids of equal ones.

    ``topk`` returns equal ones in any order, so these are all different.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    upwards = torch.where(bits < 0, -(2**31) - bits - 1, bits)
    return upwards * 2**32 - torch.arange(logits.shape[-1], device=logits.device)


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: where each row's cumulative weight passes ``u`` [rows] times its total: [rows] int64.

    Never an index of weight 0.
    """
    cumulative = weights.double().cumsum(-1)
    index = torch.searchsorted(cumulative, (u * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    last = (weights > 0).double().cumsum(-1).argmax(-1)
    return torch.minimum(index, last)
