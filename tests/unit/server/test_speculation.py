"""Speculation: what is found to draft from, when drafts pay, and what becomes of them; without a model."""

import random

import pytest

from server.engine.block_pool import BlockPool
from server.engine.prompt_lookup import MAX_LENGTH, Match, PromptLookup
from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Failed, SampledRow, SamplingParams, Sequence, Token
from server.engine.slots import SlotTable
from server.engine.speculation import MAX_ADAPTATIONS, MAX_DRAFTED_STEPS, MAX_DRAFTS, Acceptance, Speculation, StepCosts
from tests.unit.server.test_scheduler import commit, weighted


def naive_length(tokens: list[int], place: int) -> int:
    """How many tokens up to ``place`` are the same as those up to the end."""
    end = len(tokens) - 1
    same = 0
    while same < MAX_LENGTH and same <= place and tokens[place - same] == tokens[end - same]:
        same += 1
    return same


def test_the_longest_match_is_found_as_the_sequence_grows() -> None:
    rng = random.Random(0)
    tokens: list[int] = []
    lookup = PromptLookup(tokens)
    found = 0
    for _ in range(400):
        tokens += [rng.randrange(6) for _ in range(rng.choice([1, 1, 3]))]
        match = lookup.find()
        places = [p for p in range(1, len(tokens) - 1) if naive_length(tokens, p) >= 2]
        latest = places[-8:]
        if not latest:
            assert match is None
            continue
        assert match is not None
        found += 1
        longest = max(naive_length(tokens, p) for p in latest)
        assert match == Match(max(p for p in latest if naive_length(tokens, p) == longest) + 1, longest)
    assert found > 300


def test_a_draft_goes_on_where_the_sequence_ends() -> None:
    lookup = PromptLookup([9, 1, 2, 3, 1, 2])
    match = lookup.find()
    assert match == Match(3, 2)
    assert lookup.draft(match, 5) == (3, 1, 2, 3, 1)
    assert PromptLookup([5]).find() is None
    assert PromptLookup([5, 5]).find() is None
    assert PromptLookup([5, 5, 5]).find() == Match(2, 2)


def test_chances_follow_what_was_accepted_by_the_length_of_the_match() -> None:
    acceptance = Acceptance()
    for _ in range(60):
        acceptance.record(2, 0, rejected=True)
        acceptance.record(8, 3, rejected=False)
    short, middle, long = acceptance.chances
    assert short < 0.01
    assert middle == 0.6, "it was not tried"
    assert long > 0.99


def test_the_cost_of_a_row_is_measured_against_steps_without_drafts() -> None:
    costs = StepCosts(1)
    assert costs.row == 0.1
    assert not costs.comparable
    for _ in range(4):
        costs.record(0, 0.010)
    assert costs.comparable
    for _ in range(MAX_DRAFTED_STEPS):
        costs.record(5, 0.020)
    assert costs.row == pytest.approx(0.2, rel=0.02)
    assert not costs.comparable, "a step without drafts is due"
    costs.record(0, 0.010)
    assert costs.comparable
    for _ in range(40):
        costs.record(1, 5.0)
    assert costs.row <= 1, "other load on the machine is no cost of a row"


def speculation(sequences: int, row: float) -> Speculation:
    """One that has measured steps of ``sequences`` in which a drafted row costs ``row`` of a step."""
    made = Speculation()
    costs = StepCosts(sequences)
    for _ in range(200):
        costs.record(0, 1.0)
        costs.record(10, 1 + 10 * row)
    made._costs[sequences] = costs
    return made


def drafted(made: Speculation, sequences: int, sampling: SamplingParams | None = None) -> list[int]:
    """How many tokens are drafted for each of ``sequences`` that repeat themselves."""
    sampling = sampling or SamplingParams(max_tokens=100)
    chunks = [Chunk(Sequence(str(i), list(range(20)) * 2, sampling), 39, 1) for i in range(sequences)]
    return [len(chunk.drafts) for chunk in made.draft(chunks, 64, lambda s: 1000)]


def test_more_is_drafted_where_rows_are_cheap_and_nothing_where_they_are_as_dear_as_a_step() -> None:
    cheap, dear = drafted(speculation(1, 0.02), 1)[0], drafted(speculation(1, 0.3), 1)[0]
    assert MAX_DRAFTS >= cheap > dear > 0
    made = speculation(1, 1.0)
    assert drafted(made, 1) == [0]


def test_a_large_batch_drafts_less_for_each_sequence() -> None:
    alone, many, full = (sum(drafted(speculation(n, 0.05), n)) / n for n in (1, 8, 32))
    assert alone > many > full == 0


def test_drafts_stop_when_they_are_rejected_and_are_tried_again_now_and_then() -> None:
    made = speculation(1, 0.1)
    counts = []
    for _ in range(400):
        sequence = Sequence("a", list(range(20)) * 2, SamplingParams(max_tokens=100))
        (chunk,) = made.draft([Chunk(sequence, 39, 1)], 64, lambda s: 1000)
        made._costs[1].record(len(chunk.drafts), 1 + 0.1 * len(chunk.drafts))
        if chunk.drafts:
            assert made.record(chunk, [77] * (1 + len(chunk.drafts))) == 0
        made.forget(sequence)
        counts.append(len(chunk.drafts))
    assert counts[0] > 1
    assert set(counts[200:]) == {0, 1}
    assert 0 < sum(counts[200:]) < 30
    assert not made._lookups
    assert not made._matched


def test_limits_of_the_answer_the_step_and_the_request() -> None:
    made = speculation(1, 0.02)
    assert drafted(made, 1, SamplingParams(max_tokens=1)) == [0]
    assert drafted(made, 1, SamplingParams(max_tokens=3)) == [2]
    assert drafted(made, 1, SamplingParams(max_tokens=100, speculation=False)) == [0]
    chunk = Chunk(Sequence("a", list(range(20)) * 2, SamplingParams(max_tokens=100)), 39, 1)
    assert len(made.draft([chunk], 3, lambda s: 1000)[0].drafts) == 2
    assert len(made.draft([chunk], 64, lambda s: 44)[0].drafts) == 4
    prompt = Chunk(Sequence("b", list(range(20)), SamplingParams()), 0, 5)
    assert made.draft([chunk, prompt], 64, lambda s: 1000) == [chunk, prompt], "a prompt is not held up"
    assert Speculation(active=False).draft([chunk], 64, lambda s: 1000) == [chunk]


def test_only_the_last_adaptations_are_remembered() -> None:
    made = Speculation()
    for i in range(MAX_ADAPTATIONS + 5):
        made.acceptance((weighted(str(i)),)).chances[0] = 0.0
    assert len(made._acceptance) == MAX_ADAPTATIONS
    assert made.acceptance((weighted(str(MAX_ADAPTATIONS)),)).chances[0] == 0.0
    assert made.acceptance((weighted("0"),)).chances[0] > 0.0


def decoding(max_tokens: int = 30, blocks: int = 16) -> tuple[Scheduler, Sequence]:
    """A scheduler whose one sequence has a prompt that repeats itself, and one token of its answer: 3."""
    scheduler = Scheduler(
        BlockPool(blocks, 4),
        SlotTable(2, 8),
        max_sequences=4,
        max_tokens=32,
        max_wait=1.0,
        speculation=speculation(1, 0.02),
    )
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({5}))
    sequence = Sequence("a", [1, 2, 3, 4, 5, 6, 7, 8, 1, 2], sampling)
    sequence.arrived = 0.0
    scheduler.add(sequence)
    commit(scheduler, scheduler.schedule(0.0), [3])
    return scheduler, sequence


def test_accepted_drafts_and_the_token_after_them_are_appended() -> None:
    scheduler, sequence = decoding()
    batch = scheduler.schedule(0.0)
    (chunk,) = batch.chunks
    assert chunk.drafts[:2] == (4, 5)
    assert batch.sampled[:3] == [SampledRow(sequence), SampledRow(sequence, (4,)), SampledRow(sequence, (4, 5))]
    events = commit(scheduler, batch, [4, 9, *[9] * (len(chunk.drafts) - 1)])
    assert [event.token for event in events if isinstance(event, Token)] == [4, 9]
    assert sequence.output == [3, 4, 9]
    assert sequence.computed == len(sequence.tokens) - 1
    scheduler.check()


def test_only_blocks_of_final_tokens_are_cached() -> None:
    scheduler, sequence = decoding()
    batch = scheduler.schedule(0.0)
    assert batch.chunks[0].end >= 16, "the drafts fill the fourth block"
    commit(scheduler, batch, [4, *[9] * len(batch.chunks[0].drafts)])
    assert sequence.tokens == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 9]
    assert len(scheduler.blocks.match(sequence.keys)) == len(sequence.keys) == 3
    scheduler.release(sequence)
    scheduler.check()


def test_an_answer_ends_at_a_stop_token_among_the_drafts() -> None:
    scheduler, sequence = decoding()
    batch = scheduler.schedule(0.0)
    events = commit(scheduler, batch, [*batch.chunks[0].drafts, 9])
    assert [(e.token, e.finish) for e in events if isinstance(e, Token)] == [(4, None), (5, "stop")]
    assert sequence.output == [3, 4, 5]
    assert not scheduler.running
    scheduler.check()


def test_an_answer_has_no_more_than_max_tokens() -> None:
    scheduler, _ = decoding(max_tokens=3)
    batch = scheduler.schedule(0.0)
    assert batch.chunks[0].drafts == (4,)
    events = commit(scheduler, batch, [4, 9])
    assert [(e.token, e.finish) for e in events if isinstance(e, Token)] == [(4, None), (9, "length")]
    scheduler.check()


def test_a_rejected_row_that_is_not_finite_costs_the_sequence_its_blocks_only() -> None:
    scheduler, sequence = decoding()
    batch = scheduler.schedule(0.0)
    (event,) = commit(scheduler, batch, [9, *[None] * len(batch.chunks[0].drafts)])
    assert isinstance(event, Token)
    assert sequence in scheduler.waiting
    assert sequence.blocks == []
    scheduler.check()
    batch = scheduler.schedule(0.0)
    assert batch.chunks[0].sequence is sequence
    assert batch.new_blocks


def test_an_accepted_draft_that_is_not_finite_fails_the_sequence() -> None:
    scheduler, _ = decoding()
    batch = scheduler.schedule(0.0)
    token, failed = commit(scheduler, batch, [4, *[None] * len(batch.chunks[0].drafts)])
    assert isinstance(token, Token)
    assert isinstance(failed, Failed)
    assert not scheduler.running
    scheduler.check()


def test_drafts_take_no_blocks_that_others_need() -> None:
    scheduler, sequence = decoding(blocks=4)
    (chunk,) = scheduler.schedule(0.0).chunks
    assert chunk.end <= 12, "the last free block is left"
    assert len(sequence.blocks) == 3


def test_numbers_of_rejected_drafts_are_used_again() -> None:
    plain, drafting = (Sequence("a", [1], SamplingParams(seed=3)) for _ in range(2))
    wanted = []
    for _ in range(8):
        wanted.append(plain.uniform())
        plain.append(0)
    assert [drafting.uniform(ahead) for ahead in range(4)] == wanted[:4]
    for _ in range(2):
        drafting.append(0)
    assert [drafting.uniform(ahead) for ahead in range(6)] == wanted[2:]
