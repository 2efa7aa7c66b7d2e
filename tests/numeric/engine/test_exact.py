"""On a CPU with our kernels, logits are the same to the bit, whatever else is in the batch.

Logits are compared for equality, and not tokens: in bf16 the two largest logits are often so close that the last bit
decides.
"""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.engine.sequence import Adaptation, SamplingParams, Sequence, WeightedAdapter
from tests.numeric.drive import recorded_logits
from tests.numeric.exact import RANKS, engine, run_mixed, tight_engine
from tests.numeric.kernels import require_compiler

pytestmark = pytest.mark.demo

Asked = list[tuple[list[int], Adaptation, int]]
"""Prompt, adaptation, tokens to sample."""


def requests(rng: random.Random) -> Asked:
    """Requests of many lengths; every third repeats the beginning of one before it."""
    asked: Asked = []
    for i in range(18):
        names = rng.sample(sorted(RANKS), rng.choice([0, 1, 1, 2]))
        adaptation = tuple(WeightedAdapter(name, rng.choice([1.0, 0.6]), RANKS[name]) for name in names)
        prompt = [rng.randrange(3, 49000) for _ in range(rng.choice([1, 15, 33, 64, 130]))]
        if i % 3 == 2:
            earlier, adaptation, _ = asked[-1]
            prompt = earlier + prompt[:20]
        asked.append((prompt, adaptation, rng.choice([4, 14, 40])))
    return asked


def answer(served: Engine, asked: Asked, rng: random.Random | None) -> list[list[Tensor]]:
    """Each request's logits, a tensor a token: one request after the other, or all mixed at random moments."""
    sequences = [
        Sequence(f"{i}", list(prompt), SamplingParams(temperature=0, max_tokens=length), adaptation)
        for i, (prompt, adaptation, length) in enumerate(asked)
    ]
    with recorded_logits(served) as recorded:
        for together in [sequences] if rng else [[sequence] for sequence in sequences]:
            run_mixed(served, together, rng)
    return [recorded[sequence.id] for sequence in sequences]


@pytest.fixture(scope="module")
def root(demo_root: Path) -> Path:
    require_compiler()
    return demo_root


def test_logits_are_the_same_alone_and_in_mixed_batches(root: Path) -> None:
    asked = requests(random.Random(4))
    alone = answer(engine(root), asked, None)
    tight = tight_engine(root)
    for again in range(2):
        mixed = answer(tight, asked, random.Random(again))
        for i, (rows, expected) in enumerate(zip(mixed, alone, strict=True)):
            assert len(rows) == len(expected)
            for j, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
                assert torch.equal(row, wanted), f"request {i}, token {j}: {(row - wanted).abs().max()}"
    stats = tight.stats()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.cached_tokens > 0
