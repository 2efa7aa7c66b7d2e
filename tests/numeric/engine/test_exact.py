"""On a CPU with our kernels, logits are the same to the bit, whatever else is in the batch.

Logits are compared for equality, and not tokens: in bf16 the two largest logits are often so close that the last bit
decides.
"""

import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget
from adapters.format.weights import AdapterWeights
from bases.base import load_base
from server.config import Settings
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.engine.sequence import Adaptation, Failed, SamplingParams, Sequence, WeightedAdapter
from tests.numeric.drive import recorded_logits
from tests.numeric.kernels import require_compiler

pytestmark = pytest.mark.demo

RANKS = {AdapterId(name): rank for name, rank in (("a", 4), ("b", 16), ("c", 64), ("d", 16))}
DEADLINE = 120.0
Asked = list[tuple[list[int], Adaptation, int]]
"""Prompt, adaptation, tokens to sample."""


def weights(adapter: AdapterId, layout: BaseLayout) -> AdapterWeights:
    """A random adapter on all layers, the same for the same id."""
    generator = torch.Generator().manual_seed(ord(adapter))
    rank = RANKS[adapter]
    tensors = {
        name: (
            torch.randn(rank, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, rank, generator=generator) * 0.03,
        )
        for name, (inputs, outputs) in layout.linears.items()
    }
    return AdapterWeights(AdapterSpec(adapter, {name: LoraTarget(rank, 1.0) for name in tensors}, 0), tensors)


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


def engine(root: Path, **changes: object) -> Engine:
    base = load_base(Settings(data_dir=root, max_model_len=256).base)
    config = Settings(data_dir=root, **changes)
    return Engine(Runner(base, config), config, lambda adapter: weights(adapter, base.layout), lambda events: None)


def answer(served: Engine, asked: Asked, rng: random.Random | None) -> list[list[Tensor]]:
    """Each request's logits, a tensor a token: one request after the other, or all mixed at random moments."""
    sequences = [
        Sequence(f"{i}", list(prompt), SamplingParams(temperature=0, max_tokens=length), adaptation)
        for i, (prompt, adaptation, length) in enumerate(asked)
    ]
    with recorded_logits(served) as recorded:
        for together in [sequences] if rng else [[sequence] for sequence in sequences]:
            _run(served, together, rng)
    return [recorded[sequence.id] for sequence in sequences]


def _run(served: Engine, sequences: list[Sequence], rng: random.Random | None) -> None:
    waiting, live, started = list(sequences), len(sequences), time.monotonic()
    while live:
        if waiting and (rng is None or rng.random() < 0.6):
            served.submit(waiting.pop(0))
        for event in served.step():
            assert not isinstance(event, Failed), event
            live -= bool(event.finish)
        assert time.monotonic() - started < DEADLINE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_compiler()
    return tmp_path_factory.mktemp("exact")


def test_logits_are_the_same_alone_and_in_mixed_batches(root: Path) -> None:
    asked = requests(random.Random(4))
    alone = answer(engine(root), asked, None)
    tight = engine(
        root,
        max_batch_tokens=37,
        max_batch_sequences=12,
        max_device_adapters=3,
        device_ranks=256,
        kv_memory_gib=17.5 * 16 * 23040 / 2**30,
        max_wait_seconds=0.2,
    )
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
