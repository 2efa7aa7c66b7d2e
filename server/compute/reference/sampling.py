"""What takes time in proportion to the vocabulary when tokens are drawn, by torch."""

import torch
from torch import Tensor


class TorchSampling:
    """See :class:`server.compute.backend.SamplingOps`. On any device."""

    def row_peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[rows] float32, [rows] int64."""
        peak, token = logits.max(dim=-1)
        return peak, token

    def draw_rows(self, logits: Tensor, temperatures: Tensor, u: Tensor) -> Tensor:
        """[rows] int64."""
        return invert(torch.softmax(logits / temperatures.unsqueeze(-1), dim=-1), u)

    def top_rows(self, logits: Tensor, temperatures: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """[rows, width] float32, descending; [rows, width] int64."""
        probs, tokens = torch.softmax(logits / temperatures.unsqueeze(-1), dim=-1).topk(width, dim=-1)
        return probs, tokens


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """The index at which each row's cumulative weight passes ``u`` [rows] of its total: [rows]. Never a zero weight."""
    cumulative = weights.double().cumsum(-1)
    index = torch.searchsorted(cumulative, (u * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    last = (weights > 0).double().cumsum(-1).argmax(-1)
    return torch.minimum(index, last)
