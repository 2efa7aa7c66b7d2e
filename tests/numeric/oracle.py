"""The oracle: Hugging Face and PEFT alone, one sequence at a time, greedy, with eager attention."""

import copy
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from adapters.format.weights import AdapterWeights
from server.engine.sequence import Adaptation

Mix = tuple[tuple[str, float], ...]
"""(adapter name, weight) pairs; empty for the base."""

CLEAR = 1e-3
"""Smallest gap between the two best logits (of size 1 to 10) at which fp32 rounding cannot decide a greedy token."""


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy request and the expected answer."""

    mix: Mix
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer, and the smallest gap between the best and the second-best logit of its tokens."""

    tokens: tuple[int, ...]
    gap: float


class Oracle:
    """A copy of a model with all adapters loaded by PEFT. A mix is PEFT's sum of its active adapters, rescaled."""

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        own = copy.deepcopy(model)
        own.set_attn_implementation("eager")
        first, *others = folders
        peft = PeftModel.from_pretrained(own, str(folders[first]), adapter_name=first).eval()
        for name in others:
            peft.load_adapter(str(folders[name]), adapter_name=name)
        self._begin(peft)

    @classmethod
    def of(cls, peft: PeftModel) -> "Oracle":
        """Return the oracle of a model that has its adapters already, such as one that was just trained."""
        oracle = cls.__new__(cls)
        oracle._begin(peft.eval())
        return oracle

    def _begin(self, peft: PeftModel) -> None:
        self.peft = peft
        self._answers: dict[tuple[Mix, tuple[int, ...], int], Answer] = {}

    def solo(self, mix: Mix, prompt: Sequence[int], length: int) -> Answer:
        """Return ``length`` greedy tokens after ``prompt``; cached."""
        question = (mix, tuple(prompt), length)
        if question not in self._answers:
            self._answers[question] = self._generate(*question)
        return self._answers[question]

    def logits(self, mix: Mix, tokens: Sequence[int]) -> Tensor:
        """Return the logits [len(tokens), vocabulary] of one forward pass without a KV cache, fp32."""
        with torch.no_grad(), self._active(mix):
            ids = torch.tensor([tokens], device=self.peft.device)
            return self.peft(input_ids=ids, use_cache=False).logits[0].float()

    def _generate(self, mix: Mix, prompt: tuple[int, ...], length: int) -> Answer:
        ids = torch.tensor([prompt], device=self.peft.device)
        with torch.no_grad(), self._active(mix):
            out = self.peft.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=length,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.cat(out.logits).float().topk(2).values
        return Answer(tuple(out.sequences[0, len(prompt) :].tolist()), (best[:, 0] - best[:, 1]).min().item())

    def _active(self, mix: Mix) -> object:
        if not mix:
            return self.peft.disable_adapter()
        self.peft.base_model.set_adapter([name for name, _ in mix], inference_mode=True)
        for module in self.peft.modules():
            if hasattr(module, "set_scale"):
                for name, weight in mix:
                    module.set_scale(name, weight)
        return nullcontext()


def draw_requests(
    oracle: Oracle, mixes: Sequence[Mix], rng: random.Random, *, longest: int = 48, answer: int = 16
) -> list[Request]:
    """Return a request for each mix: random prompts of 1 to ``longest`` bytes, answers of 2 to ``answer`` tokens.

    A prompt whose answer depends on a near tie is drawn again, so that answers can be compared exactly.
    """
    return [_clear_request(oracle, mix, rng, longest, answer) for mix in mixes]


def _clear_request(oracle: Oracle, mix: Mix, rng: random.Random, longest: int, answer: int) -> Request:
    while True:
        prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, longest)))
        solo = oracle.solo(mix, prompt, rng.randint(2, answer))
        if solo.gap > CLEAR:
            return Request(mix, prompt, solo.tokens)


def kl(logits: Tensor, reference: Tensor) -> float:
    """Return the mean over rows of KL(reference || logits), in nats."""
    wanted = reference.log_softmax(-1)
    return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean().item()


def delta_reference(x: Tensor, adaptation: Adaptation, name: str, weights: Mapping[str, AdapterWeights]) -> Tensor:
    """Return what ``adaptation`` adds to layer ``name`` for rows ``x`` [rows, in], in float32, by the definition."""
    parts = [
        adapted.weight * weights[adapted.id].spec.targets[name].scaling * (x.float() @ a.float().T @ b.float().T)
        for adapted in adaptation
        if name in weights[adapted.id].tensors
        for a, b in [weights[adapted.id].tensors[name]]
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(())
