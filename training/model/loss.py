"""The loss of a batch, with logits only for trained positions.

With a large vocabulary, the logits of the prompts would take longer than some layers of the model, and most of the
memory of a small batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.rendering import UNTRAINED

Method = Callable[[nn.Module, nn.Module, Mapping[str, Any]], Tensor]
"""(model, its output layer, batch) -> the SUM of the loss over the batch's trained tokens, float32 scalar.

Sums of accumulated batches add up to that of one large batch. Supervised training uses :func:`answer_loss`; a
preference method would be another function of this type.
"""


def answer_loss(model: nn.Module, output: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the summed cross entropy over labels other than UNTRAINED; ``batch`` is made by ``packing.collate``."""
    labels = batch["labels"][:, 1:]
    trained = labels != UNTRAINED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with _only_at(output, trained):
        logits = model(**inputs).logits
    return F.cross_entropy(logits[0].float(), labels[trained], reduction="sum")


@contextmanager
def _only_at(output: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Pass the output layer only the positions in ``wanted``, bool [batch, tokens - 1], as one sequence [1, n, width].

    This replaces the layer's input instead of the layer, so that the model still scales or caps its logits.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0][:, : wanted.shape[1]][wanted].unsqueeze(0), *inputs[1:]

    handle = output.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats at each position, [...], of log probabilities [..., vocabulary].

    Negative values, which only rounding can give, become 0; NaN stays NaN.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def count_trained(batch: Mapping[str, Any]) -> int:
    """Return the number of trained tokens of a batch."""
    return int((batch["labels"][:, 1:] != UNTRAINED).sum())


@torch.no_grad()
def summed_loss(
    method: Method, model: nn.Module, output: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> tuple[float, int]:
    """Return (sum of the loss, trained tokens) over ``batches``, in eval mode; restore the mode."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        total += float(method(model, output, batch))
        tokens += count_trained(batch)
    model.train(training)
    return total, tokens
