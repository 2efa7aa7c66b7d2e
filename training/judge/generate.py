"""Batched greedy generation, with the answers that the server would give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

ROWS = 64
"""Default batch size: more rows gain little speed, and their KV cache takes memory."""


@dataclass(slots=True)
class Answer:
    """The model's answer to one prompt."""

    tokens: list[int] = field(default_factory=list)
    """Token ids without the end token."""
    ended: bool = False
    """Whether an end token came before the token limit."""


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: frozenset[int],
    max_tokens: int,
    context: int,
    rows: int = ROWS,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Return the greedy answer to each prompt, in the order of the prompts.

    Each has at most ``max_tokens`` tokens, the end token included, and with its prompt at most ``context``. Prompts of
    similar length share a batch of ``rows``, padded on the left; a finished row leaves it. ``advance`` is called with
    the number of newly finished answers.
    """
    answers = [Answer() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        _Batch(model, [prompts[place] for place in chosen], [answers[place] for place in chosen]).run(
            ends, max_tokens, context, advance
        )
    return answers


class _Batch:
    """The unfinished rows of a batch, and their KV cache."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], answers: list[Answer]) -> None:
        self._model = model
        self._answers = answers
        self._lengths = [len(prompt) for prompt in prompts]
        longest = max(self._lengths)
        device = model.device
        # Padding is masked, so any token will do.
        self._ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        places = torch.arange(longest, device=device)
        self._mask = (places >= longest - torch.tensor(self._lengths, device=device)[:, None]).long()
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config)

    def run(self, ends: frozenset[int], max_tokens: int, context: int, advance: Callable[[int], None]) -> None:
        """Generate until every row has ended or reached its limit."""
        while rows := len(self._answers):
            tokens = self._step()
            self._commit(tokens.tolist(), ends, max_tokens, context)
            if len(self._answers) < rows:
                advance(rows - len(self._answers))

    def _step(self) -> Tensor:
        """Run one forward pass; return the next token of each row, int64 [rows]."""
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            # A tensor, because a number makes transformers slice the hidden states, and for a slice, which is not
            # contiguous, torch copies the output layer's weights for every row.
            logits_to_keep=torch.tensor([self._ids.shape[1] - 1], device=self._ids.device),
        )
        tokens: Tensor = output.logits[:, -1].argmax(-1)
        self._ids = tokens[:, None]
        self._positions = self._positions[:, -1:] + 1
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return tokens

    def _commit(self, tokens: Sequence[int], ends: frozenset[int], max_tokens: int, context: int) -> None:
        """Append each row's token, and drop the rows that are finished."""
        going = []
        for place, (answer, token) in enumerate(zip(self._answers, tokens, strict=True)):
            if token in ends:
                answer.ended = True
                continue
            answer.tokens.append(token)
            if len(answer.tokens) < min(max_tokens, context - self._lengths[place]):
                going.append(place)
        if len(going) < len(self._answers):
            self._keep(going)

    def _keep(self, places: list[int]) -> None:
        self._answers = [self._answers[place] for place in places]
        self._lengths = [self._lengths[place] for place in places]
        if not places:
            return
        chosen = torch.tensor(places, device=self._ids.device)
        self._ids, self._mask, self._positions = self._ids[chosen], self._mask[chosen], self._positions[chosen]
        self._cache.batch_select_indices(chosen)
