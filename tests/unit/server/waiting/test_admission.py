"""Admission: which adapters are loaded for whom, and which stay."""

from adapters.format.spec import AdapterId
from server.engine.scheduler import Scheduler
from tests.unit.server.waiting.schedulers import adapter, add, ids, make, sequence, step


def load(scheduler: Scheduler, now: float) -> list[AdapterId]:
    """Place what can be placed, as the engine does if all adapters are in host memory. Returns what was placed."""
    placed = []
    in_order, last = True, False
    for wanted in scheduler.admission.missing_adapters(now):
        if last or not (in_order or wanted.late):
            continue
        if scheduler.slots.place(wanted.adapter.id, wanted.adapter.rank, wanted.keep, now):
            placed.append(wanted.adapter.id)
        else:
            in_order, last = False, wanted.late
    return placed


def test_an_adapter_with_waiting_sequences_is_not_evicted_for_one_that_has_not_waited_long() -> None:
    scheduler = make(slots=1, sequences=1, wait=5.0)
    add(scheduler, *(sequence("", of=adapter("a")) for _ in range(3)), sequence("", of=adapter("b")))
    assert load(scheduler, 0.0) == ["a"]
    seen = [ids(step(scheduler, 1.0)[0]) for _ in range(4)]
    assert len(set.union(*seen)) == 1
    assert not scheduler.running
    assert load(scheduler, 1.0) == [], "two more wait for a, which is idle for a moment"
    for _ in range(8):
        step(scheduler, 1.0)
    assert load(scheduler, 1.0) == ["b"], "nobody waits for a any more"


def test_who_has_waited_long_gets_the_slot_of_an_adapter_that_was_there_long() -> None:
    scheduler = make(slots=1, sequences=1, wait=5.0)
    add(scheduler, *(sequence("", of=adapter("a"), answer=1) for _ in range(30)), sequence("", of=adapter("b")))
    load(scheduler, 0.0)
    loads = []
    for second in range(10):
        step(scheduler, float(second))
        loads += [(second, name) for name in load(scheduler, float(second))]
    assert loads == [(6, "b")], "and b stays while it is used, and for 5 seconds if it is wanted"


def test_an_adapter_that_was_loaded_for_a_late_sequence_serves_those_that_wait_for_it_first() -> None:
    """In an overload everyone is late: without that, each request would cost a load."""
    scheduler = make(slots=1, sequences=2, wait=5.0)
    scheduler.slots.place(AdapterId("a"), 8)
    for _ in range(10):
        add(scheduler, sequence("", of=adapter("a"), answer=1), sequence("", of=adapter("b"), answer=1))
    loads = []
    now = 100.0
    while len(scheduler.waiting) or scheduler.running:
        loads += load(scheduler, now)
        step(scheduler, now)
        now += 0.5
        assert now < 200.0
    assert loads == ["b", "a"], "b's ten take 5 steps of 2, which is less than 5 seconds"


def test_adapters_are_loaded_in_the_fair_order() -> None:
    scheduler = make(slots=8)
    add(scheduler, *(sequence("flood", of=adapter(f"f{number}")) for number in range(20)))
    add(scheduler, *(sequence("light", of=adapter(f"l{number}")) for number in range(2)))
    wanted = [each.adapter.id for each in scheduler.admission.missing_adapters(0.0)]
    assert wanted[:5] == ["l0", "f0", "l1", "f1", "f2"]


def test_a_late_sequence_is_not_held_up_by_one_ahead_that_is_not_late() -> None:
    scheduler = make(slots=1, sequences=1, wait=5.0)
    add(scheduler, *(sequence("busy", of=adapter("a"), answer=1, arrived=9.0) for _ in range(30)))
    load(scheduler, 0.0)
    step(scheduler, 10.0)
    add(scheduler, sequence("busy", of=adapter("late"), arrived=0.0))
    add(scheduler, sequence("light", of=adapter("soon"), arrived=9.0))
    order = [each.adapter.id for each in scheduler.admission.missing_adapters(10.0)]
    assert order == ["soon", "late"]
    assert load(scheduler, 10.0) == ["late"]


def test_nobody_behind_takes_the_space_that_a_late_sequence_waits_for() -> None:
    scheduler = make(slots=2, sequences=4, wait=5.0)
    for name in ("a", "b"):
        scheduler.slots.place(AdapterId(name), 16)
    add(scheduler, sequence("", of=adapter("a"), answer=2), sequence("", of=adapter("b"), answer=30))
    step(scheduler, 0.0)
    large = (*adapter("large1", 16), *adapter("large2", 16))
    add(scheduler, sequence("", of=large), sequence("", of=adapter("small")))
    for _ in range(3):
        step(scheduler, 10.0)
    assert scheduler.slots.leases(AdapterId("a")) == 0
    assert load(scheduler, 10.0) == ["large1"]
