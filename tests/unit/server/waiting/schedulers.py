"""A scheduler without a model, and sequences of tenants, for tests of who is served when."""

from collections.abc import Iterator
from itertools import count

from adapters.format.spec import AdapterId
from server.engine.block_pool import BlockPool
from server.engine.commit import commit
from server.engine.scheduler import Scheduler
from server.engine.sequence import Adaptation, Batch, Event, SamplingParams, Sequence, StepResult, WeightedAdapter
from server.engine.slots import SlotTable
from server.engine.speculation import Speculation

BLOCK = 4
_numbers: Iterator[int] = count(1)


def make(
    blocks: int = 64,
    *,
    slots: int = 2,
    tokens: int = 16,
    sequences: int = 4,
    wait: float = 1.0,
    share_prefixes: bool = False,
) -> Scheduler:
    """Return a scheduler over ``blocks`` blocks of :data:`BLOCK` tokens."""
    return Scheduler(
        BlockPool(blocks, BLOCK, share_prefixes=share_prefixes),
        SlotTable(slots, 2 * slots),
        max_sequences=sequences,
        max_tokens=tokens,
        max_wait=wait,
        speculation=Speculation(active=False),
    )


def adapter(name: str, rank: int = 8) -> Adaptation:
    """Return an adaptation of one adapter."""
    return (WeightedAdapter(AdapterId(name), 1.0, rank),)


def sequence(
    tenant: str,
    prompt: int = 3,
    *,
    answer: int = 4,
    of: Adaptation = (),
    weight: float = 1.0,
    priority: int = 0,
    arrived: float = 0.0,
    deadline: float | None = None,
) -> Sequence:
    """Return a sequence with a prompt of its own, which no other shares, and a name that begins with its tenant."""
    number = next(_numbers)
    made = Sequence(
        f"{tenant}-{number}",
        [number * 1000 + position for position in range(prompt)],
        SamplingParams(max_tokens=answer),
        of,
        tenant=tenant,
        weight=weight,
        priority=priority,
        deadline=deadline,
    )
    made.arrived = arrived
    return made


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    """Queue sequences."""
    for each in sequences:
        scheduler.add(each)


def step(scheduler: Scheduler, now: float = 0.0) -> tuple[Batch, list[Event]]:
    """Run a step in which all sample token 7."""
    batch = scheduler.schedule(now)
    events = commit(scheduler, batch, StepResult([7] * len(batch.sampled)), now)
    scheduler.check()
    return batch, events


def ids(batch: Batch) -> set[str]:
    """Return the ids of the sequences in a batch."""
    return {chunk.sequence.id for chunk in batch.chunks}


def order_of_starts(scheduler: Scheduler, now: float = 0.0, *, steps: int = 1000) -> list[Sequence]:
    """Run until nothing waits; return the sequences in the order in which they started."""
    started: list[Sequence] = []
    for _ in range(steps):
        batch, _ = step(scheduler, now)
        fresh = [chunk.sequence for chunk in batch.chunks if chunk.sequence not in started]
        assert len(fresh) < 2, "make a step that starts one at a time, to see the order"
        started += fresh
        if not len(scheduler.waiting):
            return started
    raise AssertionError("something waits for ever")
