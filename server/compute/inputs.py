"""A batch as a packed sequence of tokens, the way a model is called with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from server.compute.attention import PagedAttention
from server.compute.transfer import send
from server.engine.sequence import Batch


def packed_rows(batch: Batch) -> tuple[list[int], list[int], list[int]]:
    """Token ids and positions of all rows, and the rows whose logits are wanted."""
    tokens = [token for c in batch.chunks for token in c.sequence.tokens[c.start : c.end]]
    positions = [position for c in batch.chunks for position in range(c.start, c.end)]
    rows, end = [], 0
    for chunk in batch.chunks:
        end += chunk.length
        if chunk.samples:
            rows.append(end - 1)
    return tokens, positions, rows


CallModel = Callable[[Tensor, Tensor, PagedAttention, Tensor | int], Tensor]
"""Token ids [1, rows], positions [1, rows], attention, rows to keep (0: all) -> logits [kept, vocabulary] float32."""


def call_modules(model: Any) -> CallModel:
    """A transformers model's own forward."""

    def call(ids: Tensor, positions: Tensor, paged: PagedAttention, keep: Tensor | int = 0) -> Tensor:
        out = model(input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False, paged=paged)
        logits: Tensor = out.logits[0]
        return logits.float()

    return call


def call_packed(call: CallModel, rows: tuple[list[int], ...], paged: PagedAttention, device: torch.device) -> Tensor:
    """Call a model with what :func:`packed_rows` gave, sent to ``device`` in one piece."""
    sent = send([number for part in rows for number in part], device, torch.long)
    ids, positions, keep = sent.split([len(part) for part in rows])
    return call(ids.unsqueeze(0), positions.unsqueeze(0), paged, keep)
