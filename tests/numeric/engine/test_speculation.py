"""Speculation on a CPU with our kernels: tokens and logits are the same to the bit as without it."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.sequence import Adaptation, SamplingParams, Sequence, WeightedAdapter
from server.engine.speculation import StepCosts
from tests.numeric.drive import recorded_logits
from tests.numeric.exact import RANKS, engine, run_mixed, tight_engine
from tests.numeric.kernels import require_compiler

pytestmark = pytest.mark.demo

Answer = tuple[list[int], list[Tensor]]
"""Tokens, and the logits [vocabulary] of each."""
SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 0.0, "repetition_penalty": 1.05, "presence_penalty": 0.2},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": -3},
    {"temperature": 0.0, "logit_bias": ((28, 4.0), (30, -100.0))},
    {"temperature": 0.5, "min_p": 0.1, "frequency_penalty": 0.1, "seed": 8},
)


@pytest.fixture(scope="module")
def root(demo_root: Path) -> Path:
    require_compiler()
    return demo_root


@pytest.fixture
def all_drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whenever there is a match, whatever was measured."""
    monkeypatch.setattr(StepCosts, "row", 0.0)
    monkeypatch.setattr(StepCosts, "comparable", True)


def sequences(rng: random.Random) -> list[Sequence]:
    """Requests whose prompts repeat themselves, with each way of sampling; every third extends the one before it."""
    made: list[Sequence] = []
    for i in range(24):
        names = rng.sample(sorted(RANKS), rng.choice([0, 1, 1, 2]))
        adaptation: Adaptation = tuple(WeightedAdapter(name, 0.3, RANKS[name]) for name in names)
        phrase = [rng.randrange(3, 49000) for _ in range(rng.choice([5, 9, 17]))]
        prompt = phrase * rng.choice([2, 4]) + phrase[:3]
        if i % 3 == 2:
            prompt, adaptation = made[-1].tokens + prompt[:20], made[-1].adaptation
        sampling = SamplingParams(
            **SAMPLINGS[i % len(SAMPLINGS)], max_tokens=rng.choice([2, 15, 50]), stop_token_ids=frozenset({phrase[4]})
        )
        made.append(Sequence(f"{i}", prompt, sampling, adaptation))
    return made


def answers(served: Engine, asked: list[Sequence], rng: random.Random | None) -> list[Answer]:
    """One request after the other, or all mixed at random moments."""
    with recorded_logits(served) as recorded:
        for together in [asked] if rng else [[sequence] for sequence in asked]:
            run_mixed(served, together, rng)
    return [(list(s.output), recorded[s.id][: s.output_length]) for s in asked]


@pytest.mark.usefixtures("all_drafts_pay")
def test_answers_are_the_same_to_the_bit_under_pressure(root: Path) -> None:
    plain = answers(engine(root, speculation="off"), sequences(random.Random(4)), None)
    tight = tight_engine(root)
    for again in range(2):
        drafted = answers(tight, sequences(random.Random(4)), random.Random(again))
        for i, ((tokens, logits), (wanted, expected)) in enumerate(zip(drafted, plain, strict=True)):
            assert tokens == wanted, f"request {i}"
            for j, (row, alone) in enumerate(zip(logits, expected, strict=True)):
                assert torch.equal(row, alone), f"request {i}, token {j}: {(row - alone).abs().max()}"
    stats = tight.stats()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.cached_tokens > 0
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.output_tokens == 2 * sum(len(tokens) for tokens, _ in plain)
    tight.check()


@pytest.mark.usefixtures("all_drafts_pay")
def test_a_request_can_refuse_it(root: Path) -> None:
    served = engine(root)
    phrase = list(range(100, 120))
    for speculation in (False, True):
        assert served.stats().drafted_tokens == 0
        run_mixed(
            served, [Sequence("a", phrase * 3, SamplingParams(0.0, max_tokens=20, speculation=speculation))], None
        )
    assert served.stats().drafted_tokens > 0


def test_it_is_off_where_bits_depend_on_the_rows(root: Path) -> None:
    assert not engine(root, cpu="torch").scheduler.speculation.active
    assert not engine(root, speculation="off").scheduler.speculation.active
    assert engine(root).scheduler.speculation.active
