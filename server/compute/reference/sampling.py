"""The parts of sampling that read whole rows of logits, by torch."""

import torch
from torch import Tensor


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


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: where each row's cumulative weight passes ``u`` [rows] times its total: [rows] int64.

    Never an index of weight 0.
    """
    cumulative = weights.double().cumsum(-1)
    index = torch.searchsorted(cumulative, (u * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    last = (weights > 0).double().cumsum(-1).argmax(-1)
    return torch.minimum(index, last)
