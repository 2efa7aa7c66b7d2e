"""The demo model with random adapters, driven step by step without the engine's thread: for tests of equal bits."""

import random
import time
from pathlib import Path

import torch

from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget
from adapters.format.weights import AdapterWeights
from bases.base import load_base
from server.config import Settings
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.engine.sequence import Event, Failed, Sequence, is_last

RANKS = {AdapterId(name): rank for name, rank in (("a", 4), ("b", 16), ("c", 64), ("d", 16))}
EIGHT_RANKS = RANKS | {AdapterId(name): rank for name, rank in (("e", 8), ("f", 1), ("g", 24), ("h", 16))}
OVERFLOWING = AdapterId("z")
"""Finite and well formed, of rank 8, but so large that its products overflow."""
DEADLINE = 120.0
"""Seconds without any event after which the test fails."""


def weights(adapter: AdapterId, layout: BaseLayout) -> AdapterWeights:
    """A random adapter on all layers, the same for the same id."""
    generator = torch.Generator().manual_seed(ord(adapter))
    rank = EIGHT_RANKS.get(adapter, 8)
    tensors = {
        name: (
            torch.randn(rank, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, rank, generator=generator) * 0.03,
        )
        for name, (inputs, outputs) in layout.linears.items()
    }
    if adapter == OVERFLOWING:
        tensors = {name: (a.sign() * 1e38, b.sign() * 1e38) for name, (a, b) in tensors.items()}
    return AdapterWeights(AdapterSpec(adapter, {name: LoraTarget(rank, 1.0) for name in tensors}, 0), tensors)


def engine(root: Path, **changes: object) -> Engine:
    """An engine of its own model; ``changes`` are fields of Settings."""
    base = load_base(Settings(data_dir=root, max_model_len=256).base)
    config = Settings(data_dir=root, **changes)
    return Engine(Runner(base, config), config, lambda adapter: weights(adapter, base.layout), lambda events: None)


def tight_engine(root: Path) -> Engine:
    """An engine short of batch rows, slots and KV blocks: it cuts prompts, evicts adapters and preempts."""
    return engine(
        root,
        max_batch_tokens=37,
        max_batch_sequences=12,
        max_device_adapters=3,
        device_ranks=256,
        kv_memory_gib=17.5 * 16 * 23040 / 2**30,
        max_wait_seconds=0.2,
    )


def run_mixed(
    served: Engine, sequences: list[Sequence], rng: random.Random | None, *, preempt: float = 0.0
) -> dict[str, list[Event]]:
    """Run until all have ended: submitted one a step, or at random moments. Returns each sequence's events.

    ``preempt`` is the chance, at each step with ``rng``, that one that runs is preempted.
    """
    waiting, live, latest = list(sequences), len(sequences), time.monotonic()
    events: dict[str, list[Event]] = {sequence.id: [] for sequence in sequences}
    while live:
        if waiting and (rng is None or rng.random() < 0.6):
            served.submit(waiting.pop(0))
        if rng and served.scheduler.running and rng.random() < preempt:
            served.scheduler.preempt(rng.choice(served.scheduler.running))
        for event in served.step():
            assert not isinstance(event, Failed), event
            events[event.sequence_id].append(event)
            live -= is_last(event)
            latest = time.monotonic()
        assert time.monotonic() - latest < DEADLINE
    return events
