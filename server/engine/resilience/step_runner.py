"""StepRunner: from a batch to the events of a step, whatever goes wrong on the way."""

import logging
import time
from collections.abc import Callable, Iterable

from server.engine.commit import commit
from server.engine.resilience.out_of_memory import is_out_of_memory
from server.engine.resilience.parts import Deferred, Lost, Parts, Ran
from server.engine.resilience.row_limit import RowLimit
from server.engine.resilience.step_watch import StepWatch
from server.engine.resilience.suspects import Suspects, fingerprint
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Cause, Event, Failed, Sequence, StepResult, Token
from server.engine.stats import StepCounters, StepTimes

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Failed steps in a row, with requests of different content, after which the device counts as broken."""


class StepRunner:
    """Runs batches and commits what they give. For the engine's thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        counters: StepCounters,
        times: StepTimes,
        *,
        release_memory: Callable[[], None],
        fail_copies: Callable[[], list[Failed]],
    ) -> None:
        """``release_memory`` is called when a step has too little; ``fail_copies`` fails those that a copy concerns."""
        self.watch = StepWatch(compiles=runner.backend.device.type == "cuda")
        self._runner = runner
        self._scheduler = scheduler
        self._counters = counters
        self._times = times
        self._fail_copies = fail_copies
        self._parts = Parts(self._attempt, release_memory, Suspects())
        self._row_limit = RowLimit(scheduler.max_tokens)
        self._seconds = 0.0
        """Of the last forward pass."""
        self._failing: set[bytes] = set()
        """What the steps asked for of which nothing has run, since one has."""

    @property
    def healthy(self) -> bool:
        """Whether steps do not keep failing."""
        return len(self._failing) < MAX_FAILED_STEPS

    def rows(self, now: float) -> int:
        """Return how many rows the next step may have. ``now`` is ``time.monotonic()``."""
        return self._row_limit.rows(now)

    def run(self, batch: Batch) -> list[Event]:
        """Run a batch, in parts if it must be, and commit each part that has run. Returns the events."""
        events: list[Event] = []
        lost: list[Lost] = []
        ran, short = 0, self._parts.out_of_memory
        for outcome in self._parts.run(batch):
            match outcome:
                case Ran():
                    events += self._commit(outcome)
                    ran = max(ran, outcome.batch.tokens)
                case Deferred(sequences):
                    for sequence in sequences:
                        self._scheduler.preempt(sequence)
                case Lost(sequence):
                    events += self._fail_copies()
                    if sequence.leased:  # else the copy of its adapter had failed, and that was all
                        lost.append(outcome)
                        events += self._lose(outcome)
        if self._parts.out_of_memory > short:
            self._counters.out_of_memory += self._parts.out_of_memory - short
            if ran:  # else one sequence alone needed too much, and is gone
                self._row_limit.shrink(ran, time.monotonic())
        self._counters.failed_steps += bool(lost)
        if ran:
            self._failing.clear()
        elif lost and self.healthy:  # more would say nothing new
            self._failing.add(fingerprint(lost[0].sequence))
        return events

    def _attempt(self, batch: Batch) -> StepResult:
        """Run a batch or a part of one. Raises what the runner raises."""
        self.watch.begin_forward(batch.tokens, adapted=any(chunk.sequence.adaptation for chunk in batch.chunks))
        started = time.perf_counter()
        result = self._runner.run(batch)
        ended = time.perf_counter()
        self._seconds = ended - started
        self._times.add("forward", result.forwarded - started)
        self._times.add("sample", ended - result.forwarded)
        self.watch.end_forward()
        return result

    def _commit(self, ran: Ran) -> list[Event]:
        if ran.whole:
            self._scheduler.record_step(ran.batch, self._seconds)
        started = time.perf_counter()
        self._counters.count(ran.batch)
        events = commit(self._scheduler, ran.batch, ran.result, time.monotonic())
        self._counters.output_tokens += sum(isinstance(event, Token) for event in events)
        self._times.add("commit", time.perf_counter() - started)
        return events

    def _lose(self, lost: Lost) -> list[Failed]:
        """Fail a sequence that no step can serve."""
        log.error("No step succeeds with %s", lost.sequence.id, exc_info=lost.error)
        message, cause = _reason(lost)
        return fail(self._scheduler, [lost.sequence], message, cause)


def fail(scheduler: Scheduler, sequences: Iterable[Sequence], message: str, cause: Cause = "engine") -> list[Failed]:
    """End these sequences, and return the events that say so."""
    events = []
    for sequence in sequences:
        scheduler.release(sequence)
        events.append(Failed(sequence.id, message, cause))
    return events


def _reason(lost: Lost) -> tuple[str, Cause]:
    if is_out_of_memory(lost.error):
        return f"There is not enough memory for {lost.sequence.id}; try again later.", "memory"
    if lost.blamed:
        return f"The model's step fails with {lost.sequence.id}; the server's log says why.", "request"
    return "The step that served this request failed.", "engine"
