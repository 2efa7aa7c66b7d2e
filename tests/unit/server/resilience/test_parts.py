"""Parts: a step that fails runs in halves until what is at fault is alone; one without memory runs with less."""

from collections import Counter
from collections.abc import Callable
from math import ceil, log2

from hypothesis import given
from hypothesis import strategies as st

from server.engine.resilience.parts import MAX_LOST, Deferred, Lost, Outcome, Parts, Ran
from server.engine.resilience.suspects import Suspects
from server.engine.sequence import Batch, Chunk, SamplingParams, Sequence, StepResult

SIZES = st.integers(1, 40)
LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=20)


class Trial:
    """Batches whose runs fail as a test says, and what came of each sequence."""

    def __init__(self, lengths: list[int], fails: Callable[[Batch], Exception | None]) -> None:
        self.sequences = [
            Sequence(f"{i}", [i] * length, SamplingParams(), arrived=float(i)) for i, length in enumerate(lengths)
        ]
        for number, sequence in enumerate(self.sequences):
            sequence.leased = True
            sequence.blocks = [number]
        chunks = sorted((Chunk(s, 0, len(s.tokens)) for s in self.sequences), key=lambda chunk: chunk.length > 1)
        self.batch = Batch(tuple(chunks), tuple(range(len(lengths))))
        self.fails = fails
        self.runs: list[Batch] = []
        self.released = 0
        self.suspects = Suspects()
        self.parts = Parts(self._run, self._release, self.suspects)

    def _run(self, part: Batch) -> StepResult:
        assert part.chunks
        assert [c.length > 1 for c in part.chunks] == sorted(c.length > 1 for c in part.chunks)
        assert set(part.new_blocks) <= {block for chunk in part.chunks for block in chunk.sequence.blocks}
        self.runs.append(part)
        if error := self.fails(part):
            raise error
        return StepResult([])

    def _release(self) -> None:
        self.released += 1

    def step(self) -> list[Outcome]:
        """Run the batch, and end what is lost or deferred, as the engine does."""
        outcomes = []
        for outcome in self.parts.run(self.batch):
            outcomes.append(outcome)
            gone = outcome.sequences if isinstance(outcome, Deferred) else ()
            for sequence in (outcome.sequence,) if isinstance(outcome, Lost) else gone:
                assert sequence.leased, "twice"
                sequence.leased = False
        return outcomes


def ran(outcomes: list[Outcome]) -> Counter[str]:
    return Counter(chunk.sequence.id for o in outcomes if isinstance(o, Ran) for chunk in o.batch.chunks)


def lost(outcomes: list[Outcome]) -> list[str]:
    return [outcome.sequence.id for outcome in outcomes if isinstance(outcome, Lost)]


def poisoned_by(*ids: str) -> Callable[[Batch], Exception | None]:
    return lambda part: ValueError("poison") if {c.sequence.id for c in part.chunks} & set(ids) else None


@given(SIZES, st.data())
def test_one_at_fault_is_found_in_a_logarithm_of_runs(count: int, data: st.DataObject) -> None:
    bad = str(data.draw(st.integers(0, count - 1)))
    trial = Trial([1] * count, poisoned_by(bad))
    outcomes = trial.step()
    assert lost(outcomes) == [bad]
    assert ran(outcomes) == Counter({s.id: 1 for s in trial.sequences if s.id != bad})
    rounds = ceil(log2(count))
    assert trial.parts.failures <= rounds + 1
    assert len(trial.runs) - trial.parts.failures <= rounds
    assert sum(part.tokens for part in trial.runs) <= 3 * count + rounds


@given(LENGTHS, st.sets(st.integers(0, 19), max_size=MAX_LOST - 1))
def test_each_at_fault_is_lost_and_all_others_run_once(lengths: list[int], at_fault: set[int]) -> None:
    bad = {str(number) for number in at_fault if number < len(lengths)}
    trial = Trial(lengths, poisoned_by(*bad))
    outcomes = trial.step()
    assert set(lost(outcomes)) == bad
    assert all(outcome.blamed for outcome in outcomes if isinstance(outcome, Lost))
    assert ran(outcomes) == Counter({s.id: 1 for s in trial.sequences if s.id not in bad})


def test_a_broken_device_is_noticed() -> None:
    trial = Trial([1] * 64, lambda part: RuntimeError("on fire"))
    outcomes = trial.step()
    assert len(lost(outcomes)) == 64
    assert [outcome.blamed for outcome in outcomes if isinstance(outcome, Lost)] == [True] * MAX_LOST + [False] * 56
    assert len(trial.runs) < 2 * MAX_LOST + 6


@given(LENGTHS, st.integers(1, 200))
def test_too_little_memory_defers_the_youngest_and_loses_none(lengths: list[int], room: int) -> None:
    """Here a row takes a fixed amount; what ran is as much as there is room for, to a factor of 4."""
    trial = Trial(lengths, lambda part: MemoryError() if part.tokens > room else None)
    outcomes = trial.step()
    deferred = [s.id for o in outcomes if isinstance(o, Deferred) for s in o.sequences]
    done = ran(outcomes)
    assert not lost(outcomes)
    assert done.keys() | set(deferred) == {s.id for s in trial.sequences}
    assert not done.keys() & set(deferred)
    assert max(map(int, done)) < min(map(int, deferred), default=99), "a younger one ran instead of an older one"
    assert trial.released == (sum(lengths) > room)
    assert trial.parts.out_of_memory <= log2(64) + log2(20) + 2
    rows = sum(part.tokens for o in outcomes if isinstance(o, Ran) for part in [o.batch])
    assert rows >= min(room, sum(lengths)) / 4


def test_one_that_never_fits_is_lost_alone() -> None:
    trial = Trial([30, 1, 1], lambda part: MemoryError() if any(c.sequence.id == "0" for c in part.chunks) else None)
    outcomes = trial.step()
    assert lost(outcomes) == ["0"]
    assert trial.runs[-1].tokens == 1
    assert {s.id for o in outcomes if isinstance(o, Deferred) for s in o.sequences} == {"1", "2"}


def test_a_probe_is_never_cut() -> None:
    trial = Trial([16], lambda part: MemoryError())
    trial.sequences[0].probe = True
    assert lost(trial.step()) == ["0"]
    assert [part.tokens for part in trial.runs] == [16, 16]


def test_the_same_content_again_runs_apart() -> None:
    def same(part: Batch) -> Exception | None:
        return ValueError() if any(chunk.sequence.tokens[0] == 7 for chunk in part.chunks) else None

    suspects = Suspects()
    for again in range(3):
        trial = Trial([1] * 16, same)
        trial.parts = Parts(trial._run, trial._release, suspects)
        assert lost(trial.step()) == ["7"]
        assert len(trial.runs) == (2 if again else 9)
        assert trial.parts.failures == (1 if again else 5)


def test_of_the_same_content_one_is_tried() -> None:
    trial = Trial([1] * 16, lambda part: ValueError() if any(c.sequence.tokens == [7] for c in part.chunks) else None)
    for sequence in trial.sequences[5:11]:
        sequence.tokens = [7]
    assert set(lost(trial.step())) == {str(number) for number in range(5, 11)}
    assert sum(1 for part in trial.runs if len(part.chunks) == 1 and part.chunks[0].sequence.tokens == [7]) == 1


def test_a_suspect_that_passes_is_suspected_no_more() -> None:
    trial = Trial([1] * 4, poisoned_by("2"))
    trial.step()
    assert len(trial.suspects) == 1
    again = Trial([1] * 4, lambda part: None)
    again.parts = Parts(again._run, again._release, trial.suspects)
    again.step()
    assert [len(part.chunks) for part in again.runs] == [3, 1]
    assert len(trial.suspects) == 0
