"""Scores of a model: its loss, its KL divergence from the base, and how its answers compare with the right ones."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from training.data.rendering import UNTRAINED, Example
from training.judge.generate import Answer
from training.model.loss import kl_divergence

BATCH_TOKENS = 1024
"""Maximum number of tokens in a batch, padding included."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one model on the held-out rows; None if nothing could be measured. Shares are 0 to 1."""

    loss: float | None = None
    """Mean loss per trained token, in nats."""
    exact_match: float | None = None
    """Share of answers equal to the right one, leading and trailing white space aside."""
    stop_share: float | None = None
    """Share of answers that ended with an EOS token before the limit."""
    json_validity: float | None = None
    """Share of valid JSON among answers whose right answer is a JSON object or array."""
    json_equality: float | None = None
    """Share of those answers with the same keys and values as the right one."""


@torch.inference_mode()
def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Return the mean cross entropy per trained token, in nats."""
    total, count = 0.0, 0
    for batch in _batches(examples):
        log_probs, labels = _log_probs(model, batch)
        total -= log_probs.gather(1, labels[:, None]).sum(dtype=torch.float64).item()
        count += len(labels)
    return total / count


@torch.inference_mode()
def mean_kl(model: Any, examples: Sequence[Example]) -> float:
    """Return the mean KL(adapter || base) per trained token, in nats; ``model`` is a PEFT model."""
    total, count = 0.0, 0
    for batch in _batches(examples):
        adapted, labels = _log_probs(model, batch)
        with model.disable_adapter():
            plain, _ = _log_probs(model, batch)
        total += kl_divergence(adapted, plain).sum(dtype=torch.float64).item()
        count += len(labels)
    return total / count


def score_answers(examples: Sequence[Example], answers: Sequence[Answer], texts: Sequence[str]) -> Scores:
    """Return all scores but the loss; ``texts`` are the decoded answers."""
    said = [text.strip() for text in texts]
    right = [example.answer.strip() for example in examples]
    pairs = [
        (wanted, parse_json(text)) for text, answer in zip(said, right, strict=True) if (wanted := parse_json(answer))
    ]
    return Scores(
        exact_match=_share(text == answer for text, answer in zip(said, right, strict=True)),
        stop_share=_share(answer.ended for answer in answers),
        json_validity=_share(found is not None for _, found in pairs) if pairs else None,
        json_equality=_share(found == wanted for wanted, found in pairs) if pairs else None,
    )


@dataclass(frozen=True, slots=True)
class Parsed:
    """A JSON object or array. Numbers are stored as tuples of one, since to Python ``1 == True``."""

    value: dict[str, Any] | list[Any]


def parse_json(text: str) -> Parsed | None:
    """Parse ``text`` if all of it is a JSON object or array; else return None, also for a bare number or word."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_real)
    except (ValueError, RecursionError):
        return None
    return Parsed(value) if isinstance(value, dict | list) else None


def _integer(digits: str) -> tuple[int]:
    return (int(digits),)


def _real(digits: str) -> tuple[float]:
    return (float(digits),)


def _refuse(word: str) -> NoReturn:
    """Reject NaN and Infinity, which Python's parser accepts but JSON does not have."""
    raise ValueError(f"{word} is not JSON")


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield batches of rows of similar length, of at most BATCH_TOKENS tokens or one row."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example.input_ids)):
        if batch and (len(batch) + 1) * len(example.input_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _log_probs(model: Any, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return (log probabilities, float32 [trained tokens, vocabulary]; the right tokens, int64 [trained tokens])."""
    longest = len(batch[-1].input_ids)
    lengths = [len(example.input_ids) for example in batch]
    pads = [longest - length for length in lengths]
    ids = torch.tensor([example.input_ids + [0] * pad for example, pad in zip(batch, pads, strict=True)])
    labels = torch.tensor([example.labels + [UNTRAINED] * pad for example, pad in zip(batch, pads, strict=True)])
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    wanted = labels[:, 1:] != UNTRAINED
    # Only these positions need the output layer, which is a large part of a small model.
    columns = wanted.any(0).nonzero()[:, 0]
    device = model.device
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=columns.to(device))
    here = wanted[:, columns]
    logits = output.logits[here.to(device)].float()
    return logits.log_softmax(-1), labels[:, 1:][:, columns][here].to(device)
