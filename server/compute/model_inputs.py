"""The tensors that a model is called with: all tokens of a batch as one packed sequence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.compute.attention import PagedAttention
from server.compute.transfer import to_device
from server.engine.sequence import Batch


class ModelInputs(NamedTuple):
    """A batch as lists of numbers. A row is one token."""

    tokens: list[int]
    """Of every row."""
    positions: list[int]
    """Of every row, in its own sequence."""
    logit_rows: list[int]
    """The rows whose logits are needed: those that are sampled from, then those that are scored."""
    hidden_rows: list[int]
    """The rows whose hidden states are needed."""


def make_inputs(batch: Batch) -> ModelInputs:
    """The rows of ``batch``, chunk after chunk."""
    tokens = [token for c in batch.chunks for token in (*c.sequence.tokens[c.start : c.end], *c.drafts)]
    positions = [position for c in batch.chunks for position in range(c.start, c.end)]
    sampled: list[int] = []
    scored: list[int] = []
    pooled: list[int] = []
    end = 0
    for chunk in batch.chunks:
        start, end = end, end + chunk.length
        sampled += range(end - len(chunk.sampled), end)
        read = scored if chunk.sequence.pooling is None else pooled
        read += [start + position - chunk.start for position in chunk.read]
    return ModelInputs(tokens, positions, sampled + scored, pooled)


class ForwardOutput(NamedTuple):
    """What a forward pass computes, of the rows that need it, in the order of :class:`ModelInputs`."""

    logits: Tensor
    """[rows, vocabulary] float32."""
    hidden: Tensor | None = None
    """Hidden states after the model's last norm, [rows, hidden size] float32; None if none are needed."""


ModelForward = Callable[[Tensor, Tensor, PagedAttention, Tensor | int, Tensor | None], ForwardOutput]
"""Token ids [1, rows], positions [1, rows], attention, rows whose logits are needed (0: all), and those whose hidden
states are (None: none)."""


def transformers_forward(model: Any) -> ModelForward:
    """The forward pass of a transformers model, through its own modules."""

    def forward(
        ids: Tensor, positions: Tensor, paged: PagedAttention, keep: Tensor | int = 0, hidden_rows: Tensor | None = None
    ) -> ForwardOutput:
        with _recorded_hidden_states(model, hidden_rows) as hidden:
            out = model(input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False, paged=paged)
        logits: Tensor = out.logits[0]
        return ForwardOutput(logits.float(), *hidden)

    return forward


@contextmanager
def _recorded_hidden_states(model: Any, rows: Tensor | None) -> Iterator[list[Tensor]]:
    """A list that gets the hidden states of ``rows``, if any, [rows, hidden size] float32, as the model is called."""
    recorded: list[Tensor] = []
    if rows is None:
        yield recorded
        return
    hook = model.base_model.register_forward_hook(
        lambda module, inputs, output: recorded.append(output.last_hidden_state[0, rows].float())
    )
    try:
        yield recorded
    finally:
        hook.remove()


def call_model(
    forward: ModelForward, inputs: ModelInputs, paged: PagedAttention, device: torch.device
) -> ForwardOutput:
    """Copy ``inputs`` to ``device`` in one piece and run ``forward``."""
    sent = to_device([number for part in inputs for number in part], device, torch.long)
    ids, positions, keep, hidden = sent.split([len(part) for part in inputs])
    return forward(ids.unsqueeze(0), positions.unsqueeze(0), paged, keep, hidden if len(hidden) else None)
