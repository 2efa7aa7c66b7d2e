"""Scheduler: log probabilities and vectors of prompts, and where a sequence's time went; without a model."""

import pytest

from adapters.format.spec import AdapterId
from server.engine.commit import commit
from server.engine.scheduler import MAX_SCORED_ROWS, Scheduler
from server.engine.sequence import (
    Batch,
    Event,
    Failed,
    Pooled,
    Pooling,
    PromptLogprobs,
    SamplingParams,
    Sequence,
    StepResult,
    Timing,
    Token,
    TokenLogprobs,
    is_last,
)
from tests.unit.server.test_scheduler import make, weighted


def scored(name: str, prompt: int, *, max_tokens: int = 1) -> Sequence:
    tokens = [ord(name[0]) * 100 + i for i in range(prompt)]
    return Sequence(name, tokens, SamplingParams(max_tokens=max_tokens), prompt_logprobs=0)


def pooled(name: str, prompt: int, pooling: Pooling) -> Sequence:
    return Sequence(name, list(range(prompt)), SamplingParams(max_tokens=0), pooling=pooling)


def result(batch: Batch) -> StepResult:
    """Tokens 7; for each position the token after it as its log probability; sums that name the positions in them."""
    return StepResult(
        [7] * len(batch.sampled),
        scores=[[TokenLogprobs(c.sequence.tokens[p + 1], 1) for p in c.read] for c in batch.scored],
        pooled=[(c.sequence.hidden or b"") + bytes(c.read) for c in batch.pooled],
    )


def step(scheduler: Scheduler, now: float = 0.0) -> tuple[dict[str, int], list[Event]]:
    batch = scheduler.schedule(now)
    events = commit(scheduler, batch, result(batch), now)
    scheduler.check()
    return {chunk.sequence.id: chunk.length for chunk in batch.chunks}, events


def expected(sequence: Sequence) -> tuple[TokenLogprobs | None, ...]:
    return (None, *(TokenLogprobs(token, 1) for token in sequence.tokens[1 : sequence.prompt_length]))


def test_a_prompts_log_probabilities_come_once_before_its_first_token() -> None:
    scheduler = make()
    sequence = scored("a", 20, max_tokens=2)
    scheduler.add(sequence)
    events = [event for _ in range(4) for event in step(scheduler)[1]]
    assert events == [PromptLogprobs("a", expected(sequence)), Token("a", 7), Token("a", 7, "length")]
    assert [is_last(event) for event in events] == [False, False, True]


@pytest.mark.parametrize("length", [1, 8, 9])
def test_without_an_answer_they_are_the_only_event(length: int) -> None:
    scheduler = make()
    sequence = scored("a", length, max_tokens=0)
    scheduler.add(sequence)
    (event,) = [event for _ in range(3) for event in step(scheduler)[1]]
    assert event == PromptLogprobs("a", expected(sequence), "length")
    assert is_last(event)
    assert event.timing is not None
    assert not scheduler.running


def test_a_step_computes_few_rows_of_them_beside_everything_else() -> None:
    scheduler = make(blocks=1000, tokens=2000)
    for name in ("a", "b"):
        scheduler.add(scored(name, MAX_SCORED_ROWS - 50, max_tokens=0))
    scheduler.add(Sequence("plain", list(range(300)), SamplingParams()))
    lengths, events = step(scheduler)
    assert lengths == {"a": MAX_SCORED_ROWS - 50, "b": 51, "plain": 300}
    assert [event.sequence_id for event in events] == ["a", "plain"]
    lengths, _ = step(scheduler)
    assert lengths == {"b": MAX_SCORED_ROWS - 101, "plain": 1}
    assert not scheduler.running[1:]


def test_their_tokens_are_not_taken_from_the_prefix_cache_but_cached_for_others() -> None:
    scheduler = make(tokens=64)
    for prompt_logprobs, length in ((True, 10), (True, 10), (False, 2)):
        sequence = scored("a", 10) if prompt_logprobs else Sequence("a", scored("a", 10).tokens, SamplingParams())
        scheduler.add(sequence)
        assert step(scheduler)[0] == {"a": length}


def test_what_was_read_survives_a_preemption() -> None:
    scheduler = make(blocks=9)
    sequences = [scored("a", 17, max_tokens=9), pooled("b", 15, "mean"), scored("c", 13, max_tokens=0)]
    found: dict[str, list[Event]] = {"a": [], "b": [], "c": []}
    for sequence in sequences:
        scheduler.add(sequence)
    for number in range(30):
        if number in (2, 5):
            scheduler.preempt(scheduler.running[-1])
        for event in step(scheduler)[1]:
            found[event.sequence_id].append(event)
    assert found["a"][0] == PromptLogprobs("a", expected(sequences[0]))
    assert len(found["a"]) == 10
    assert found["b"] == [Pooled("b", bytes(range(15)))]
    assert found["c"] == [PromptLogprobs("c", expected(sequences[2]), "length")]
    assert scheduler.preemptions >= 2
    assert not scheduler.running


def test_a_preempted_prompt_takes_hits_up_to_what_was_read() -> None:
    scheduler = make()
    sequence = scored("a", 20)
    scheduler.add(sequence)
    step(scheduler)
    scheduler.preempt(sequence)
    batch = scheduler.schedule(0.0)
    assert [(chunk.start, chunk.read) for chunk in batch.chunks] == [(8, range(8, 16))]


@pytest.mark.parametrize(("pooling", "hits"), [("last", 8), ("mean", 0)])
def test_vectors_and_the_prefix_cache(pooling: Pooling, hits: int) -> None:
    scheduler = make(tokens=64)
    for cached in (0, hits):
        scheduler.add(pooled("a", 10, pooling))
        ((event,),) = [step(scheduler)[1]]
        assert isinstance(event, Pooled)
        assert (event.cached, event.vector) == (cached, bytes(range(9 if pooling == "last" else 0, 10)))
        assert is_last(event)


def test_outputs_that_are_not_finite_fail_only_their_sequence() -> None:
    scheduler = make(tokens=64)
    for sequence in (scored("a", 5), scored("b", 5), pooled("c", 5, "mean"), pooled("d", 5, "last")):
        scheduler.add(sequence)
    batch = scheduler.schedule(0.0)
    good = result(batch)
    events = commit(scheduler, batch, StepResult(good.tokens, (), [None, good.scores[1]], [None, b"vector"]), 0.0)
    assert [type(event) for event in events] == [Failed, PromptLogprobs, Token, Failed, Pooled]
    assert [event.sequence_id for event in events] == ["a", "b", "b", "c", "d"]
    assert not scheduler.running
    scheduler.check()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_frees_everything(steps: int) -> None:
    scheduler = make(tokens=16)
    names = ("a", "b", "c")
    for sequence in (scored("a", 40), pooled("b", 40, "mean"), pooled("c", 40, "last")):
        scheduler.add(sequence)
    for _ in range(steps):
        step(scheduler)
    assert all(scheduler.abort(name) for name in names)
    scheduler.check()
    assert scheduler.blocks.used == 0


def test_the_last_event_says_where_the_time_went() -> None:
    scheduler = make()
    sequence = Sequence("a", [1] * 12, SamplingParams(max_tokens=3), (weighted("x"),))
    sequence.arrived = 10.0
    scheduler.add(sequence)
    step(scheduler, 11.0)
    scheduler.slots.place(AdapterId("x"), 8, now=14.0)
    base = Sequence("b", [1], SamplingParams(max_tokens=1))
    scheduler.add(base)
    for now in (15.0, 17.0, 18.0, 20.0):
        _, events = step(scheduler, now)
    (event,) = events
    assert isinstance(event, Token)
    assert event.timing == Timing(
        queue=1.0, load=4.0, prefill=2.0, decode=3.0, cold=True, batch_adapters=2, preemptions=0
    )


def test_an_adapter_that_was_there_takes_no_time_to_load() -> None:
    scheduler = make()
    scheduler.slots.place(AdapterId("x"), 8, now=3.0)
    sequence = Sequence("a", [1], SamplingParams(max_tokens=1), (weighted("x"),))
    sequence.arrived = 10.0
    scheduler.add(sequence)
    (event,) = step(scheduler, 12.0)[1]
    assert isinstance(event, Token)
    assert event.timing == Timing(
        queue=2.0, load=0.0, prefill=0.0, decode=0.0, cold=False, batch_adapters=1, preemptions=0
    )
