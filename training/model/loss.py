"""The loss of a batch, with the output layer computed only where something is trained.

A prompt's positions need no logits; over a large vocabulary they would cost more than some of the model's layers, and
most of a small batch's memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.rendering import UNTRAINED

Method = Callable[[nn.Module, nn.Module, Mapping[str, Any]], Tensor]
"""(model, its output layer, batch) -> the SUM of the loss over the batch's trained tokens, float32.

A sum, so that batches of an accumulated step add up to the loss of one large batch. Supervised training's is
:func:`answer_loss`; a preference method would be another function of this form.
"""


def answer_loss(model: nn.Module, output: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross entropy over labels other than UNTRAINED; :func:`training.data.packing.collate` makes ``batch``."""
    labels = batch["labels"][:, 1:]
    trained = labels != UNTRAINED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with _only_at(output, trained):
        logits = model(**inputs).logits
    return F.cross_entropy(logits[0].float(), labels[trained], reduction="sum")


@contextmanager
def _only_at(output: nn.Module, wanted: Tensor) -> Iterator[None]:
    """The output layer gets the rows of ``wanted`` [batch, tokens - 1] alone, as one sequence [1, wanted, width].

    Before the layer rather than after it, so that what the model does to its logits (scales, caps) is still done.
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
    """Tokens of a batch that the loss is taken on."""
    return int((batch["labels"][:, 1:] != UNTRAINED).sum())


@torch.no_grad()
def summed_loss(
    method: Method, model: nn.Module, output: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> tuple[float, int]:
    """(sum of the loss, trained tokens) over ``batches``, in eval mode; the mode is as before afterwards."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        total += float(method(model, output, batch))
        tokens += count_trained(batch)
    model.train(training)
    return total, tokens
