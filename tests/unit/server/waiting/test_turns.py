"""Turns: what is kept in order is what one finds by sorting all that waits, at any moment."""

import time
from collections.abc import Iterator
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.format.spec import AdapterId
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.waiting.fairness import PROMPT_TOKEN, Flow
from server.engine.waiting.turns import fair_order
from tests.unit.server.waiting.schedulers import adapter, add, make, sequence, step

WAIT = 5.0
"""Seconds after which a sequence is late."""


def waiting_flows(scheduler: Scheduler) -> list[Flow]:
    """All flows of which something waits."""
    queue = scheduler.waiting
    return [flow for tenant in queue._tenants.waiting.values() for flow in tenant.flows.waiting.values()]


def sorted_order(scheduler: Scheduler, now: float) -> Iterator[Flow]:
    """What fair_order() returns, the plain way: each time the tenant with the least counter, its first flow."""
    flows: dict[str, list[Flow]] = {}
    for flow in sorted(waiting_flows(scheduler), key=lambda flow: flow.rank(now)):
        flows.setdefault(flow.head.tenant, []).append(flow)
    counters = {tenant: own[0].tenant.counter for tenant, own in flows.items()}
    while flows:
        tenant = min(flows, key=lambda tenant: (counters[tenant], flows[tenant][0].tenant.turn))
        flow = flows[tenant].pop(0)
        counters[tenant] += PROMPT_TOKEN * len(flow.head.tokens) / flow.tenant.weight
        if not flows[tenant]:
            del flows[tenant]
        yield flow


def expected_adapters(scheduler: Scheduler, now: float) -> list[tuple[AdapterId, bool]]:
    """The adapters to load, and whether their sequences are late, by the plain order."""
    return [
        (each.id, now - flow.head.arrived > WAIT)
        for flow in sorted_order(scheduler, now)
        for each in flow.adaptation
        if each.id not in scheduler.slots
    ]


def expected_first(scheduler: Scheduler, now: float) -> tuple[Flow | None, Flow | None]:
    """The first flow whose adapters are there, and the first late one of the others."""
    flows = sorted(waiting_flows(scheduler), key=lambda flow: flow.rank(now))
    ready = [flow for flow in flows if flow.adapters <= scheduler.slots.resident]
    late = [flow for flow in flows if flow not in ready and now - flow.head.arrived > WAIT]
    return next(iter(ready), None), next(iter(late), None)


ADAPTATIONS = ((), *(adapter(name) for name in "abcd"), (*adapter("a"), *adapter("b")))
ASKED = st.tuples(
    st.sampled_from(["x", "y", "z"]), st.sampled_from(ADAPTATIONS), st.integers(1, 6), st.sampled_from([-3, 0, 0, 4])
)
DEEDS = st.one_of(
    st.tuples(st.just("ask"), ASKED),
    st.tuples(st.just("step"), st.floats(0.0, 3.0)),
    st.tuples(st.just("load"), st.sampled_from("abcd")),
    st.tuples(st.just("leave"), st.integers(0, 30)),
    st.tuples(st.just("preempt"), st.integers(0, 30)),
)


@settings(max_examples=150, deadline=None)
@given(deeds=st.lists(DEEDS, min_size=10, max_size=60))
def test_what_is_kept_in_order_is_what_one_finds_by_sorting(deeds: list[tuple[str, object]]) -> None:
    scheduler = make(blocks=24, slots=2, sequences=3, wait=WAIT)
    now = 1000.0
    for deed, how in deeds:
        match deed, how:
            case "ask", (str(tenant), tuple(of), int(prompt), int(priority)):
                add(scheduler, sequence(tenant, prompt, of=of, priority=priority, arrived=now))
            case "step", float(seconds):
                now += seconds
                step(scheduler, now)
            case "load", str(name):
                if AdapterId(name) not in scheduler.slots:
                    scheduler.slots.place(AdapterId(name), 8, (), now)
            case "leave", int(number):
                unfinished: list[Sequence] = [*scheduler.running, *scheduler.waiting]
                if unfinished:
                    scheduler.release(unfinished[number % len(unfinished)])
            case "preempt", int(number):
                if scheduler.running:
                    scheduler.preempt(scheduler.running[number % len(scheduler.running)])
        admission = scheduler.admission
        found = [(wanted.adapter.id, wanted.late) for wanted in admission.missing_adapters(now)]
        assert found == expected_adapters(scheduler, now)
        openings = admission.openings(now, frozenset())
        ready, late = expected_first(scheduler, now)
        assert openings.until == (late.rank(now) if late else ())
        openings.closed = set()
        assert admission.first(openings, now) is ready
        assert list(fair_order(admission._ready, admission._missing)) == list(sorted_order(scheduler, now))
        assert scheduler.waiting.adapters == {id_ for flow in waiting_flows(scheduler) for id_ in flow.adapters}


def test_a_more_urgent_request_puts_those_back_that_were_as_urgent_as_any() -> None:
    """Until then they took turns by their counters; now the one that came first is first."""
    scheduler = make(sequences=0)
    later, sooner = (
        sequence("", of=adapter("a"), priority=4, arrived=1000.0),
        sequence("", of=adapter("b"), priority=4, arrived=999.0),
    )
    urgent = sequence("", of=adapter("c"), priority=-3, arrived=1000.0)
    add(scheduler, later, sooner)
    scheduler.waiting.charge(sooner, 10.0)

    def order() -> list[AdapterId]:
        return [wanted.adapter.id for wanted in scheduler.admission.missing_adapters(1000.0)]

    assert order() == ["a", "b"]
    add(scheduler, urgent)
    assert order() == ["c", "b", "a"]
    scheduler.release(urgent)
    assert order() == ["a", "b"]


def seconds_to_look(waiting: int) -> float:
    """Least time, over some steps, to schedule one and to see what it could load, with ``waiting`` adapters missing."""
    scheduler = make(blocks=4096, slots=16, sequences=16, tokens=64, wait=1e9)
    for number in range(16):
        scheduler.slots.place(AdapterId(f"r{number}"), 8)
        add(scheduler, sequence("", of=adapter(f"r{number}"), answer=10**6))
    add(scheduler, *(sequence("", of=adapter(f"m{number}"), answer=10**6) for number in range(waiting)))
    times = []
    for number in range(12):
        started = time.perf_counter()
        assert len(list(islice(scheduler.admission.missing_adapters(0.0), 9))) == min(waiting, 9)
        assert len(scheduler.waiting.adapters) >= waiting
        batch = scheduler.schedule(0.0)
        if number > 2:
            times.append(time.perf_counter() - started)
        assert len(batch.chunks) == 16
    return min(times)


def test_a_step_takes_no_longer_because_more_adapters_are_waited_for() -> None:
    few, many = seconds_to_look(64), seconds_to_look(4096)
    assert many < 4 * few, "sorting all of them would take about 30 times as long"
