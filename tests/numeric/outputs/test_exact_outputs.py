"""On a CPU with our kernels, everything that a request gets is the same to the bit, whatever else is in the batch.

Tokens, their log probabilities, those of prompts, and vectors, with drafts, chunks, preemptions and prefix hits.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.engine.sequence import Adaptation, Event, Pooled, PromptLogprobs, SamplingParams, Sequence, Token
from server.engine.sequence import WeightedAdapter as Weighted
from server.engine.speculation import StepCosts
from tests.numeric.exact import EIGHT_RANKS, engine, run_mixed, tight_engine
from tests.numeric.kernels import require_compiler

pytestmark = pytest.mark.demo

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def root(demo_root: Path) -> Path:
    require_compiler()
    return demo_root


@pytest.fixture(autouse=True)
def all_drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whenever there is a match, whatever was measured."""
    monkeypatch.setattr(StepCosts, "row", 0.0)
    monkeypatch.setattr(StepCosts, "comparable", True)


def sequences(rng: random.Random) -> list[Sequence]:
    """For eight adapters, the base and mixes: every kind of request, with prompts that repeat themselves."""
    made: list[Sequence] = []
    for i in range(32):
        names = [sorted(EIGHT_RANKS)[i % 8]] if i % 4 else rng.sample(sorted(EIGHT_RANKS), rng.choice([0, 2]))
        adaptation: Adaptation = tuple(Weighted(name, 0.3, EIGHT_RANKS[name]) for name in names)
        phrase = [rng.randrange(3, 49000) for _ in range(rng.choice([5, 9, 17]))]
        prompt = phrase * rng.choice([2, 4]) + phrase[:3]
        if i % 3 == 2:
            prompt, adaptation = made[-1].tokens + prompt[:20], made[-1].adaptation
        stops, length = frozenset({phrase[4]}), rng.choice([2, 15, 30])
        sampling = replace(GREEDY, max_tokens=length, stop_token_ids=stops, logprobs=rng.choice([None, 0, 5, 20]))
        match i % 7:
            case 0:
                sampling = replace(sampling, temperature=0.8, top_p=0.9, seed=i, presence_penalty=0.3)
            case 1:
                sampling = replace(sampling, min_tokens=length - 1, logit_bias=((phrase[4], 40.0),))
        asks = {
            2: {"pooling": "mean"},
            3: {"pooling": "last"},
            4: {"prompt_logprobs": 3},
            5: {"prompt_logprobs": 0, "sampling": replace(sampling, max_tokens=0)},
        }.get(i % 7, {})
        made.append(Sequence(f"{i}", prompt, **{"sampling": sampling, **asks}, adaptation=adaptation))
    return made


def answers(served: Engine, asked: list[Sequence], rng: random.Random | None) -> list[list[Event]]:
    """One request after the other, or all mixed at random moments; without what depends on the prefix cache."""
    found: dict[str, list[Event]] = {}
    for together in [asked] if rng else [[sequence] for sequence in asked]:
        found |= run_mixed(served, together, rng, preempt=0.1)
    return [[replace(event, cached=0) for event in found[sequence.id]] for sequence in asked]


def test_outputs_are_the_same_alone_and_in_mixed_batches(root: Path) -> None:
    plain = answers(engine(root, speculation="off"), sequences(random.Random(4)), None)
    kinds = {type(event) for events in plain for event in events}
    assert kinds == {Token, PromptLogprobs, Pooled}
    tight = tight_engine(root)
    for again in range(2):
        for i, (mine, alone) in enumerate(
            zip(answers(tight, sequences(random.Random(4)), random.Random(again)), plain, strict=True)
        ):
            assert mine == alone, f"request {i}"
    stats = tight.stats()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.cached_tokens > 0
    assert stats.accepted_tokens > 0
    tight.check()
