"""The tensors that a model is called with: all tokens of a batch as one packed sequence."""

from collections.abc import Callable
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
    sampled_rows: list[int]
    """The rows whose logits are needed."""


def make_inputs(batch: Batch) -> ModelInputs:
    """The rows of ``batch``, chunk after chunk."""
    tokens = [token for c in batch.chunks for token in (*c.sequence.tokens[c.start : c.end], *c.drafts)]
    positions = [position for c in batch.chunks for position in range(c.start, c.end)]
    rows: list[int] = []
    end = 0
    for chunk in batch.chunks:
        end += chunk.length
        rows += range(end - len(chunk.sampled), end)
    return ModelInputs(tokens, positions, rows)


ModelForward = Callable[[Tensor, Tensor, PagedAttention, Tensor | int], Tensor]
"""Token ids [1, rows], positions [1, rows], attention, rows to keep (0: all) -> logits [kept, vocabulary] float32."""


def transformers_forward(model: Any) -> ModelForward:
    """The forward pass of a transformers model, through its own modules."""

    def forward(ids: Tensor, positions: Tensor, paged: PagedAttention, keep: Tensor | int = 0) -> Tensor:
        out = model(input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False, paged=paged)
        logits: Tensor = out.logits[0]
        return logits.float()

    return forward


def call_model(forward: ModelForward, inputs: ModelInputs, paged: PagedAttention, device: torch.device) -> Tensor:
    """Copy ``inputs`` to ``device`` in one piece and run ``forward``: logits [sampled rows, vocabulary] float32."""
    sent = to_device([number for part in inputs for number in part], device, torch.long)
    ids, positions, keep = sent.split([len(part) for part in inputs])
    return forward(ids.unsqueeze(0), positions.unsqueeze(0), paged, keep)
