"""Commit: what the result of a step changes in its sequences, and the events of that."""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import zip_longest
from typing import NamedTuple

from server.engine.grammar import GrammarFailure
from server.engine.scheduler import Scheduler
from server.engine.sequence import (
    Batch,
    Chunk,
    Event,
    Failed,
    FinishReason,
    Pooled,
    PromptLogprobs,
    Sequence,
    StepResult,
    Token,
    TokenLogprobs,
)
from server.engine.waiting.fairness import ANSWER_TOKEN

log = logging.getLogger(__name__)


def commit(scheduler: Scheduler, batch: Batch, result: StepResult, now: float) -> list[Event]:
    """Update the sequences of a batch that has run, and return the events. ``now`` is ``time.monotonic()``.

    A sequence whose logits or hidden states are not finite fails, and no other; nor does one whose result cannot be
    taken in, whatever the reason.
    """
    step = _Commit(scheduler, batch, result, now)
    events: list[Event] = []
    for chunk in batch.chunks:
        found = step.results_of(chunk)  # of all chunks, also those that fail: the next one's must not be its
        try:
            events.extend(step.take(chunk, found))  # keeps those before an exception
        except Exception:
            log.exception("The result of a step for %s cannot be taken in", chunk.sequence.id)
            if chunk.sequence.leased:
                scheduler.release(chunk.sequence)
                events.append(Failed(chunk.sequence.id, "The step that served this request failed."))
    return events


class _Drawn(NamedTuple):
    """What a step has sampled in one place."""

    token: int | None
    logprobs: TokenLogprobs | None
    failure: GrammarFailure | None
    """Why the grammar has no mask for this place, so that the token must not be used."""


class _Results(NamedTuple):
    """What a step has found for one chunk."""

    drawn: list[_Drawn]
    scores: Seq[TokenLogprobs] | None
    """None also where none were asked for."""
    hidden: bytes | None
    """The same."""


class _Commit:
    """Takes in one chunk of a step after the other."""

    def __init__(self, scheduler: Scheduler, batch: Batch, result: StepResult, now: float) -> None:
        self._scheduler = scheduler
        self._now = now
        self._adapters = batch.adapters
        failures = map(result.unmasked.get, range(len(result.tokens)))
        self._sampled = map(_Drawn._make, zip_longest(result.tokens, result.logprobs, failures))
        self._scores = iter(result.scores)
        self._pooled = iter(result.pooled)
        self._logits = result.logits

    def results_of(self, chunk: Chunk) -> _Results:
        """The results of the batch's next chunk. Changes nothing."""
        drawn = [next(self._sampled) for _ in chunk.sampled]
        if not chunk.read:
            return _Results(drawn, None, None)
        if chunk.sequence.pooling is None:
            return _Results(drawn, next(self._scores), None)
        return _Results(drawn, None, next(self._pooled))

    def take(self, chunk: Chunk, found: _Results) -> Iterator[Event]:
        """Take in the results of a chunk."""
        sequence = chunk.sequence
        sequence.batch_adapters = max(sequence.batch_adapters, self._adapters)
        self._mark_computed(sequence, chunk.end - len(chunk.drafts))
        if sequence.pooling is None:
            yield from self._take_scores(chunk, found.scores)
        else:
            yield from self._take_hidden(chunk, found.hidden)
        yield from self._append_tokens(chunk, found.drawn)

    def _mark_computed(self, sequence: Sequence, end: int) -> None:
        start, sequence.computed = sequence.computed, end
        if sequence.probe:
            return  # not cached: no request has this prefix
        blocks = self._scheduler.blocks
        filled = range(start // blocks.size, end // blocks.size)
        if filled:
            blocks.chain_keys(sequence)
        for index in filled:
            blocks.cache(sequence.blocks[index], sequence.keys[index])

    def _take_scores(self, chunk: Chunk, found: Seq[TokenLogprobs] | None) -> Iterator[PromptLogprobs | Failed]:
        """Take in the log probabilities of a chunk's tokens, and deliver those of the prompt when it is complete."""
        sequence = chunk.sequence
        if sequence.scores is None:
            return
        if chunk.read:
            if found is None:
                yield self._fail_not_finite(sequence)
                return
            sequence.scores += found
            sequence.read += len(found)
        if chunk.end >= sequence.prompt_length:
            logprobs = (None, *sequence.scores)
            sequence.scores = None
            if sequence.samples:
                yield PromptLogprobs(sequence.id, logprobs, cached=sequence.cached)
            else:
                self._scheduler.release(sequence)
                yield PromptLogprobs(sequence.id, logprobs, "length", sequence.cached, sequence.timing(self._now))

    def _take_hidden(self, chunk: Chunk, found: bytes | None) -> Iterator[Pooled | Failed]:
        """Take in what was pooled of a chunk, and deliver the vector when the prompt is complete."""
        sequence, rows = chunk.sequence, chunk.read
        if not rows:
            return
        sequence.read, sequence.hidden = rows.stop, found
        if found is None:
            yield self._fail_not_finite(sequence)
        elif rows.stop == sequence.prompt_length:
            self._scheduler.release(sequence)
            yield Pooled(sequence.id, found, sequence.cached, sequence.timing(self._now))

    def _append_tokens(self, chunk: Chunk, drawn: Seq[_Drawn]) -> Iterator[Token | Failed]:
        """Append the tokens sampled for a chunk, up to the first that is not the draft for its place."""
        sequence, sampled = chunk.sequence, [token for token, _, _ in drawn]
        accepted = self._scheduler.speculation.record(chunk, sampled) if chunk.drafts else 0
        for place, (token, logprobs, failure) in enumerate(drawn[: accepted + 1]):
            if not sequence.leased:
                return  # the answer has ended
            if failure is not None and place > 0:
                return  # the next step tries again, where only the answer's own tokens count
            self._mark_computed(sequence, len(sequence.tokens))
            if failure is not None:
                yield self._fail_grammar(sequence, failure)
            elif token is None:
                yield self._fail_not_finite(sequence)
            else:
                yield self._append_token(sequence, token, logprobs)
        if sequence.leased and None in sampled:
            self._scheduler.preempt(sequence)  # its blocks may hold keys and values that are not finite: take others

    def _append_token(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Token | Failed:
        sequence.append(token)
        self._scheduler.waiting.charge(sequence, ANSWER_TOKEN)
        if sequence.first_token is None:
            sequence.first_token = self._now
        finish = _finish(sequence, token)
        if sequence.matcher and (failure := sequence.matcher.accept(token, last=finish == "stop")):
            return self._fail_grammar(sequence, failure)
        if finish:
            self._scheduler.release(sequence)
        timing = sequence.timing(self._now) if finish else None
        return Token(sequence.id, token, finish, sequence.cached, self._logits, logprobs, timing)

    def _fail_grammar(self, sequence: Sequence, failure: GrammarFailure) -> Failed:
        self._scheduler.release(sequence)
        if not failure.too_complex:
            return Failed(sequence.id, f"The grammar of this answer cannot be followed further: {failure.message}")
        message = f"The grammar of this answer is too complex to be followed further: {failure.message}"
        return Failed(sequence.id, message, "grammar")

    def _fail_not_finite(self, sequence: Sequence) -> Failed:
        self._scheduler.release(sequence)
        if not sequence.adaptation:
            return Failed(sequence.id, "The model's output was not finite.")
        return Failed(sequence.id, "The model's output was not finite: this adapter or mix cannot be used.", "adapter")


def _finish(sequence: Sequence, token: int) -> FinishReason | None:
    if token in sequence.sampling.stop_token_ids:
        return "stop"
    return "length" if sequence.output_length >= sequence.sampling.max_tokens else None
