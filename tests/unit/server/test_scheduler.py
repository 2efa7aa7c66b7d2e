"""Scheduler: what runs in which step, without a model."""

import pytest

from adapters.format.spec import AdapterId
from server.engine.block_pool import BlockPool
from server.engine.commit import commit as commit_result
from server.engine.scheduler import Scheduler
from server.engine.sequence import (
    Adaptation,
    Batch,
    Event,
    Failed,
    SamplingParams,
    Sequence,
    StepResult,
    Token,
    WeightedAdapter,
)
from server.engine.slots import SlotTable
from server.engine.speculation import Speculation


def make(blocks: int = 16, *, slots: int = 2, tokens: int = 8, sequences: int = 4, wait: float = 1.0) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, 4),
        SlotTable(slots, 8),
        max_sequences=sequences,
        max_tokens=tokens,
        max_wait=wait,
        speculation=Speculation(active=False),
    )


def sequence(name: str, prompt: int, adaptation: Adaptation = (), *, max_tokens: int = 4) -> Sequence:
    tokens = [ord(name[0]) * 100 + i for i in range(prompt)]
    made = Sequence(name, tokens, SamplingParams(max_tokens=max_tokens), adaptation)
    made.arrived = 0.0
    return made


def weighted(name: str, rank: int = 8) -> WeightedAdapter:
    return WeightedAdapter(AdapterId(name), 1.0, rank)


def commit(scheduler: Scheduler, batch: Batch, tokens: list[int | None], logits: bytes | None = None) -> list[Event]:
    return commit_result(scheduler, batch, StepResult(tokens, logits=logits), now=0.0)


def missing_ids(scheduler: Scheduler) -> list[AdapterId]:
    return [wanted.adapter.id for wanted in scheduler.admission.missing_adapters(0.0)]


def step(scheduler: Scheduler, now: float = 0.0) -> tuple[dict[str, int], list[Event]]:
    """Run a step in which all sample token 7. Returns chunk lengths by sequence id, and the events."""
    batch = scheduler.schedule(now)
    lengths = {chunk.sequence.id: chunk.length for chunk in batch.chunks}
    events = commit(scheduler, batch, [7] * len(batch.sampled))
    scheduler.check()
    return lengths, events


def test_a_long_prompt_runs_in_chunks_and_samples_at_its_end() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 20))
    seen = [step(scheduler) for _ in range(4)]
    assert [lengths for lengths, _ in seen] == [{"a": 8}, {"a": 8}, {"a": 4}, {"a": 1}]
    assert [len(events) for _, events in seen] == [0, 0, 1, 1]


def test_decoding_sequences_run_beside_a_prefill_that_gets_the_remaining_tokens() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 3))
    step(scheduler)
    scheduler.add(sequence("b", 30))
    assert step(scheduler)[0] == {"a": 1, "b": 7}


def test_single_tokens_come_first_in_a_batch() -> None:
    scheduler = make(tokens=16)
    scheduler.add(sequence("long", 9))
    scheduler.add(sequence("short", 1))
    assert [chunk.length for chunk in scheduler.schedule(0.0).chunks] == [1, 9]


def test_the_youngest_sequence_is_preempted_and_resumes() -> None:
    scheduler = make(blocks=5)
    old, young = sequence("old", 8, max_tokens=5), sequence("young", 7, max_tokens=5)
    for s in (old, young):
        scheduler.add(s)
    finished = {}
    for _ in range(30):
        for event in step(scheduler)[1]:
            if isinstance(event, Token) and event.finish:
                finished[event.sequence_id] = event.finish
    assert finished == {"old": "length", "young": "length"}
    assert young.preemptions > 0
    assert old.preemptions == 0
    assert young.output == [7] * 5


def test_prompts_share_prefix_blocks_but_not_across_adapters() -> None:
    scheduler = make(tokens=64)
    scheduler.slots.place(AdapterId("x"), 8)
    cached = []
    for adaptation in ((), (), (weighted("x"),)):
        s = sequence("a", 10, adaptation)
        scheduler.add(s)
        step(scheduler)
        cached.append(s.cached)
        scheduler.release(s)
    assert cached == [0, 8, 0]


def test_a_sequence_without_its_adapter_is_skipped() -> None:
    scheduler = make()
    scheduler.add(sequence("cold", 3, (weighted("x"),)))
    scheduler.add(sequence("base", 3))
    assert step(scheduler)[0] == {"base": 3}
    scheduler.slots.place(AdapterId("x"), 8)
    assert step(scheduler)[0] == {"base": 1, "cold": 3}


def test_new_sequences_of_an_adapter_being_copied_wait_while_others_run() -> None:
    scheduler = make()
    scheduler.slots.place(AdapterId("x"), 8)
    scheduler.slots.copying = frozenset({AdapterId("x")})
    scheduler.add(sequence("a", 3))
    scheduler.add(sequence("b", 3, (weighted("x"),)))
    assert step(scheduler)[0] == {"a": 3, "b": 3}, "no sequence was running yet"
    scheduler.add(sequence("c", 3, (weighted("x"),)))
    assert step(scheduler)[0] == {"a": 1, "b": 1}
    scheduler.slots.copying = frozenset()
    assert step(scheduler)[0] == {"a": 1, "b": 1, "c": 3}


def test_a_sequence_skipped_too_long_closes_an_adapter_to_sequences_behind_it() -> None:
    scheduler = make(slots=1, sequences=2)
    scheduler.slots.place(AdapterId("hot"), 8)
    scheduler.add(sequence("h1", 3, (weighted("hot"),)))
    scheduler.add(sequence("cold", 3, (weighted("cold"),)))
    scheduler.add(sequence("h2", 3, (weighted("hot"),)))
    assert step(scheduler, now=0.5)[0] == {"h1": 3, "h2": 3}, "max_wait has not passed"
    scheduler.add(sequence("h3", 3, (weighted("hot"),)))
    for _ in range(4):
        assert "h3" not in step(scheduler, now=2.0)[0]
    assert scheduler.slots.leases(AdapterId("hot")) == 0
    assert scheduler.slots.place(AdapterId("cold"), 8, keep={AdapterId("cold")})
    assert "cold" in step(scheduler, now=2.0)[0]


def test_sequences_ahead_of_a_starving_one_still_run() -> None:
    scheduler = make(slots=1)
    scheduler.slots.place(AdapterId("hot"), 8)
    scheduler.add(sequence("h1", 3, (weighted("hot"),)))
    scheduler.add(sequence("cold", 3, (weighted("cold"),)))
    assert step(scheduler, now=100.0)[0] == {"h1": 3}


def test_adapters_of_sequences_ahead_are_not_evicted() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 3, (weighted("x"), weighted("y"))))
    scheduler.add(sequence("b", 3, (weighted("z"),)))
    missing = scheduler.admission.missing_adapters(0.0)
    wanted = [(each.adapter.id, set(each.keep), each.sequence.id) for each in missing if each.sequence]
    assert wanted == [("x", {"x", "y"}, "a"), ("y", {"x", "y"}, "a"), ("z", {"x", "y", "z"}, "b")]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_abort_at_any_step_frees_blocks_and_leases(steps: int) -> None:
    scheduler = make()
    scheduler.slots.place(AdapterId("x"), 8)
    scheduler.add(sequence("a", 12, (weighted("x"),)))
    for _ in range(steps):
        step(scheduler)
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    scheduler.check()
    assert scheduler.blocks.used == 0
    assert scheduler.slots.leases(AdapterId("x")) == 0


def test_a_stop_token_ends_a_sequence_and_logits_that_are_not_finite_fail_only_theirs() -> None:
    scheduler = make()
    stops = Sequence("stops", [1], SamplingParams(max_tokens=9, stop_token_ids=frozenset({7})))
    breaks = Sequence("breaks", [1], SamplingParams(max_tokens=9))
    scheduler.add(stops)
    scheduler.add(breaks)
    batch = scheduler.schedule(0.0)
    first, second = commit(scheduler, batch, [7, None])
    assert first == Token("stops", 7, "stop", 0)
    assert isinstance(second, Failed)
    assert second.cause == "engine", "there was no adapter"
    assert not scheduler.running
    scheduler.check()


def probe(name: str, prompt: int = 3, adaptation: Adaptation = (), *, keep: bool = False) -> Sequence:
    return Sequence(name, list(range(prompt)), SamplingParams(max_tokens=1), adaptation, probe=True, keep=keep)


def test_probes_run_first_and_alone_at_most_every_other_step() -> None:
    scheduler = make(sequences=2)
    for name in ("a", "b", "c"):
        scheduler.add(sequence(name, 2))
    assert step(scheduler)[0] == {"a": 2, "b": 2}
    scheduler.add(probe("p"))
    scheduler.add(probe("q"))
    assert [step(scheduler)[0] for _ in range(4)] == [{"p": 3}, {"a": 1, "b": 1}, {"q": 3}, {"a": 1, "b": 1}]


def test_probes_run_in_consecutive_steps_if_nothing_else_can_run() -> None:
    scheduler = make()
    scheduler.add(sequence("cold", 3, (weighted("x"),)))
    for name in ("p", "q"):
        scheduler.add(probe(name))
    assert [step(scheduler)[0] for _ in range(3)] == [{"p": 3}, {"q": 3}, {}]


def test_a_probe_ignores_the_prefix_cache_and_returns_logits() -> None:
    scheduler = make()
    warm = Sequence("warm", list(range(8)), SamplingParams(max_tokens=1))
    scheduler.add(warm)
    step(scheduler)
    scheduler.add(probe("p", 8))
    batch = scheduler.schedule(0.0)
    assert [(chunk.start, chunk.length) for chunk in batch.chunks] == [(0, 8)]
    assert commit(scheduler, batch, [7], b"logits") == [Token("p", 7, "length", 0, b"logits")]


def test_a_probe_is_not_cached() -> None:
    scheduler = make()
    scheduler.add(probe("p", 8))
    step(scheduler)
    scheduler.add(Sequence("same", list(range(8)), SamplingParams()))
    assert step(scheduler)[0] == {"same": 8}


def test_a_probe_preempts_the_youngest_sequence() -> None:
    scheduler = make(blocks=4, tokens=32)
    old, young = sequence("old", 7), sequence("young", 7)
    for s in (old, young):
        scheduler.add(s)
    step(scheduler)
    scheduler.add(probe("p"))
    scheduler.add(probe("q"))
    assert step(scheduler)[0] == {"p": 3}
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert [s.id for s in scheduler.waiting] == ["q", "young"], "a preempted sequence waits behind probes"


def test_a_probe_without_its_adapter_delays_others_only_after_max_wait() -> None:
    scheduler = make(slots=1)
    scheduler.slots.place(AdapterId("hot"), 8)
    scheduler.add(sequence("h1", 3, (weighted("hot"),)))
    step(scheduler)
    waits = probe("p", 3, (weighted("cold"),))
    waits.arrived = 0.0
    scheduler.add(waits)
    scheduler.add(sequence("h2", 3, (weighted("hot"),)))
    assert step(scheduler, now=0.5)[0] == {"h1": 1, "h2": 3}
    scheduler.add(sequence("h3", 3, (weighted("hot"),)))
    for _ in range(4):
        assert "h3" not in step(scheduler, now=2.0)[0]
    assert scheduler.slots.place(AdapterId("cold"), 8, keep={AdapterId("cold")})
    assert step(scheduler, now=2.0)[0] == {"p": 3}


@pytest.mark.parametrize(
    ("used", "keep", "order"), [("a", False, "xab"), ("ax", False, "axb"), ("a", True, "abx"), ("ax", True, "abx")]
)
def test_adapters_used_only_by_probes_are_evicted_first(used: str, keep: bool, order: str) -> None:
    """Adapters that others have used keep their place in the order. With ``keep`` a probe counts as use."""
    scheduler = make(slots=3)
    for name in "axb":
        scheduler.slots.place(AdapterId(name), 8)
    for name in used:
        scheduler.slots.lease([AdapterId(name)])
        scheduler.slots.release([AdapterId(name)])
    scheduler.slots.lease([AdapterId("b")])
    scheduler.slots.release([AdapterId("b")])
    scheduler.add(probe("p", 3, (weighted("x"),), keep=keep))
    step(scheduler)
    assert "".join(scheduler.slots.resident) == order


def test_pinned_adapters_are_loaded_before_those_of_waiting_sequences() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 3, (weighted("x"),)))
    scheduler.admission.pin([weighted("p"), weighted("q")], now=0.0)
    assert missing_ids(scheduler) == ["p", "q", "x"]
    scheduler.slots.place(AdapterId("p"), 8)
    assert missing_ids(scheduler) == ["q", "x"]
    scheduler.admission.pin([], now=0.0)
    assert missing_ids(scheduler) == ["x"]


def test_a_pin_that_does_not_fit_for_too_long_closes_the_least_used_adapter() -> None:
    scheduler = make(slots=2, sequences=8)
    for name in ("busy", "calm"):
        scheduler.slots.place(AdapterId(name), 8)
    for name, adapter in (("b1", "busy"), ("b2", "busy"), ("c1", "calm")):
        scheduler.add(sequence(name, 2, (weighted(adapter),)))
    step(scheduler)
    scheduler.admission.pin([weighted("pinned")], now=0.0)
    for name, adapter in (("b3", "busy"), ("c2", "calm")):
        scheduler.add(sequence(name, 2, (weighted(adapter),)))
    assert step(scheduler, now=0.5)[0].keys() == {"b1", "b2", "b3", "c1", "c2"}, "max_wait has not passed"
    for name, adapter in (("b4", "busy"), ("c3", "calm")):
        scheduler.add(sequence(name, 2, (weighted(adapter),)))
    seen = set().union(*(step(scheduler, now=2.0)[0] for _ in range(6)))
    assert "b4" in seen
    assert "c3" not in seen
    assert scheduler.slots.place(AdapterId("pinned"), 8)
    assert AdapterId("calm") not in scheduler.slots
