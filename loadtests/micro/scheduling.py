"""Measures the scheduler alone: ``python -m loadtests.micro.scheduling [--waiting 512] [--json FILE]``.

Runs steps without a model, in which all places are taken and nothing ends, and prints how long it takes to decide what
runs in a step, and to look at the adapters that requests wait for.

Unlike the other load tests this one imports the server: it measures one part of it.
"""

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median

from adapters.format.spec import AdapterId
from server.engine.block_pool import BlockPool
from server.engine.commit import commit
from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Sequence, StepResult, WeightedAdapter
from server.engine.slots import SlotTable
from server.engine.speculation import Speculation

PLACES = 32
SLOTS = 16
STEPS = 400
LOOKED_AT = 9
"""Adapters that the engine looks at in a step in which it can load none."""
CASES = {
    "no tenants, the base": (1, 0),
    "no tenants, 16 adapters": (1, 16),
    "no tenants, 512 adapters": (1, 512),
    "8 tenants, 16 adapters": (8, 16),
    "64 tenants, 512 adapters": (64, 512),
}
"""Name -> tenants, and adapters of the waiting sequences."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.micro.scheduling", description="Measure the scheduler.")
    parser.add_argument("--waiting", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for name, (tenants, adapters) in CASES.items():
        figures[name] = {}
        for waiting in (0, args.waiting):
            schedule, look = _measure(tenants, adapters, waiting)
            figures[name] |= {f"schedule, {waiting} waiting": schedule, f"adapters to load, {waiting} waiting": look}
        print(f"{name}:", ", ".join(f"{what} {us:.0f} us" for what, us in figures[name].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _measure(tenants: int, adapters: int, waiting: int) -> tuple[float, float]:
    """Return the medians, in microseconds, of scheduling a step and of looking for adapters to load."""
    scheduler = Scheduler(
        BlockPool(PLACES * 64, 16),
        SlotTable(SLOTS, SLOTS),
        max_sequences=PLACES,
        max_tokens=256,
        max_wait=1e9,
        speculation=Speculation(active=False),
    )
    for number in range(min(adapters, SLOTS)):
        scheduler.slots.place(AdapterId(str(number)), 8)
    for number in range(PLACES + waiting):
        of = number % min(adapters, SLOTS) if adapters and number < PLACES else number % max(adapters, 1)
        adaptation = (WeightedAdapter(AdapterId(str(of)), 1.0, 8),) if adapters else ()
        tokens = [number * 100 + position for position in range(40)]
        scheduler.add(
            Sequence(str(number), tokens, SamplingParams(max_tokens=10**6), adaptation, tenant=str(number % tenants))
        )
    times, looks = [], []
    for number in range(STEPS):
        started = time.perf_counter()
        for _ in islice(scheduler.admission.missing_adapters(0.0), LOOKED_AT):
            pass
        _ = scheduler.waiting.adapters  # which the engine's statistics have after each step
        looked = time.perf_counter()
        batch = scheduler.schedule(0.0)
        done = time.perf_counter()
        commit(scheduler, batch, StepResult([7] * len(batch.sampled)), 0.0)
        if number > STEPS // 4:
            times.append((done - looked) * 1e6)
            looks.append((looked - started) * 1e6)
    assert len(scheduler.running) == PLACES
    return median(times), median(looks)


if __name__ == "__main__":
    sys.exit(main())
