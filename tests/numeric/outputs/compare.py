"""Log probabilities and vectors that a drive's sequences were given, against the oracle's."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.sequence import Pooled, Pooling, PromptLogprobs, SamplingParams, Token, TokenLogprobs
from server.engine.sequence import Sequence as EngineSequence
from tests.numeric.drive import Drive
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix

NEAR = 2e-4
"""Largest difference of log probabilities by float32 in another order."""


def ask(
    drive: Drive,
    mix: Mix,
    tokens: Sequence[int],
    sampling: SamplingParams,
    *,
    prompt_logprobs: int | None = None,
    pooling: Pooling | None = None,
) -> str:
    """Submit a request for a mix of adapters by name; return its id."""
    sequence = EngineSequence(
        f"s{len(drive.tokens)}",
        list(tokens),
        sampling,
        drive.adaptation(mix),
        prompt_logprobs=prompt_logprobs,
        pooling=pooling,
    )
    return drive.submit_sequence(sequence)


def check_logprobs(found: TokenLogprobs | None, token: int, logits: Tensor, count: int) -> None:
    """Compare what was found of ``token`` and the ``count`` most likely ones with ``logits`` [vocabulary]."""
    assert found is not None
    expected = logits.log_softmax(-1)
    own = expected[token].item()
    assert found.logprob == pytest.approx(own, abs=NEAR)
    assert 1 + int((expected > own + NEAR).sum()) <= found.rank <= 1 + int((expected > own - NEAR).sum())
    assert len(found.top) == count
    for (id_, logprob), wanted in zip(found.top, expected.sort(descending=True).values.tolist(), strict=False):
        assert logprob == pytest.approx(wanted, abs=NEAR)
        assert expected[id_].item() == pytest.approx(wanted, abs=NEAR)


def check_answer(lab: Lab, drive: Drive, id_: str, mix: Mix, prompt: Sequence[int], count: int) -> None:
    """Compare the log probabilities of an answer's tokens with the oracle's."""
    answer = [event for event in drive.events[id_] if isinstance(event, Token)]
    assert answer
    logits = lab.oracle.logits(mix, [*prompt, *drive.tokens[id_]])[len(prompt) - 1 : -1].cpu()
    for event, row in zip(answer, logits, strict=True):
        check_logprobs(event.logprobs, event.token, row, count)


def check_prompt(lab: Lab, drive: Drive, id_: str, mix: Mix, prompt: Sequence[int], count: int) -> None:
    """Compare the log probabilities of a prompt's tokens, which come first and once, with the oracle's."""
    events = [event for event in drive.events[id_] if isinstance(event, PromptLogprobs)]
    assert events == drive.events[id_][:1]
    first, *others = events[0].logprobs
    assert first is None
    for found, token, row in zip(others, prompt[1:], lab.oracle.logits(mix, prompt)[:-1].cpu(), strict=True):
        check_logprobs(found, token, row, count)


def vector(drive: Drive, id_: str) -> Tensor:
    """The vector of a sequence, which was its only event: [hidden size] float32."""
    (event,) = drive.events[id_]
    assert isinstance(event, Pooled)
    return torch.from_numpy(np.frombuffer(event.vector, np.float32).copy())


def expected_vector(lab: Lab, mix: Mix, prompt: Sequence[int], pooling: Pooling) -> Tensor:
    """By PEFT's model alone, from the output of its last norm: [hidden size] float32."""
    (norm,) = (module for name, module in lab.oracle.peft.named_modules() if name.endswith("model.norm"))
    states: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, inputs, output: states.append(output[0].cpu()))
    lab.oracle.logits(mix, prompt)
    hook.remove()
    return states[0][-1] if pooling == "last" else states[0].mean(0)
