"""Measures how far one model's outputs diverge from another's, over a few prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bases.nf4 import Linear4bit
from training.model.base import keep_trainable
from training.model.loss import kl_divergence
from training.progress_bar import Advance

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    'Reply with JSON: the order 1042 of "Ana" arrived late, and she wants her money back.',
    "def fibonacci(n):",
    "Ma facture est fausse, que dois-je faire ?",
    "List three fruits, one a line.",
)
"""Questions, prose, data, code and another language: an error in any part of a model changes some of them."""
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """The outputs of one model."""

    tokens: tuple[tuple[int, ...], ...]
    """Per prompt: ids of prompt and answer, which ``log_probs`` were computed over."""
    log_probs: tuple[Tensor, ...]
    """Per prompt: float32 [tokens, vocabulary], predictions of the next token at each position."""
    answers: tuple[tuple[int, ...], ...]
    """Per prompt: the model's own greedy answer, of at most NEW_TOKENS tokens."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence of a model from a reference."""

    mean_kl: float
    """Mean KL(reference || model) in nats over all positions of prompts and answers; NaN if a logit is."""
    max_kl: float
    top1: float
    """Share of positions where both predict the same most likely token."""
    greedy: int
    """Number of tokens before the greedy answers differ, summed over all prompts."""
    greedy_of: int
    positions: int

    def within(self, limit: "DivergenceLimit") -> bool:
        """Return whether the divergence is within ``limit``; NaN is not."""
        return self.mean_kl <= limit.mean_kl and self.top1 >= limit.top1

    def __str__(self) -> str:
        return (
            f"KL {self.mean_kl:.2g} (at most {self.max_kl:.2g}), same most likely token at {self.top1:.1%} of "
            f"{self.positions} positions, greedy answers agree for {self.greedy} of {self.greedy_of} tokens"
        )


@dataclass(frozen=True, slots=True)
class DivergenceLimit:
    """The largest divergence that rounding can explain."""

    mean_kl: float
    top1: float


def encode_prompts(tokenizer: Any) -> list[list[int]]:
    """Return PROMPTS as token ids, as a chat's first turn if the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        return [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    turns = ([{"role": "user", "content": text}] for text in PROMPTS)
    return [list(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]) for turn in turns]


def compute_exactly(model: nn.Module) -> None:
    """Make a model that has not run yet compute in float32, with unchanged weights.

    With bfloat16 activations, two runs of the same model differ by a KL of 0.01, which would hide errors of an export.
    """
    keep_trainable(model)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


@torch.no_grad()
def collect_outputs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    reference: ModelOutputs | None = None,
    advance: Advance = lambda _: None,
) -> ModelOutputs:
    """Return the model's greedy answers to ``prompts``, and its predictions over the reference's answers, or its own.

    ``advance`` is called after each answer.
    """
    answers = tuple(_answer(model, prompt, advance) for prompt in prompts)
    own = tuple((*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True))
    tokens = reference.tokens if reference else own
    log_probs = tuple(_logits(model, ids).log_softmax(-1) for ids in tokens)
    return ModelOutputs(tokens, log_probs, answers)


def compare(reference: ModelOutputs, observed: ModelOutputs) -> Divergence:
    """Return the divergence of ``observed`` from ``reference``; both must be over the same tokens."""
    kls, same = [], []
    for ours, theirs in zip(observed.log_probs, reference.log_probs, strict=True):
        kls.append(kl_divergence(theirs, ours))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    kl = torch.cat(kls)
    return Divergence(
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item() if not kl.isnan().any() else math.nan,
        top1=torch.cat(same).float().mean().item(),
        greedy=sum(_common_length(*pair) for pair in zip(reference.answers, observed.answers, strict=True)),
        greedy_of=sum(map(len, reference.answers)),
        positions=kl.numel(),
    )


def _answer(model: Any, prompt: Sequence[int], advance: Advance) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        # Unset the generation config's sampling options: transformers warns about them in greedy decoding.
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    advance(1)
    return tuple(output[0, len(prompt) :].tolist())


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the logits at each position, float32 [tokens, vocabulary]."""
    logits: Tensor = model(torch.tensor([list(ids)], device=model.device)).logits
    return logits[0].float().cpu()


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens before the first difference."""
    differ = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
