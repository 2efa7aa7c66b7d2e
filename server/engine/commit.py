"""Commit: what the result of a step changes in its sequences, and the events of that."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import zip_longest

from server.engine.block_pool import chain_keys
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


def commit(scheduler: Scheduler, batch: Batch, result: StepResult, now: float) -> list[Event]:
    """Update the sequences of a batch that has run, and return the events. ``now`` is ``time.monotonic()``.

    A sequence whose logits or hidden states are not finite fails, and no other.
    """
    step = _Commit(scheduler, batch, result, now)
    return [event for chunk in batch.chunks for event in step.take(chunk)]


class _Commit:
    """Takes in one chunk of a step after the other."""

    def __init__(self, scheduler: Scheduler, batch: Batch, result: StepResult, now: float) -> None:
        self._scheduler = scheduler
        self._now = now
        self._adapters = batch.adapters
        self._sampled = zip_longest(result.tokens, result.logprobs)
        self._scores = iter(result.scores)
        self._pooled = iter(result.pooled)
        self._logits = result.logits

    def take(self, chunk: Chunk) -> Iterator[Event]:
        """Take in the results of the batch's next chunk."""
        sequence, drawn = chunk.sequence, [next(self._sampled) for _ in chunk.sampled]
        sequence.batch_adapters = max(sequence.batch_adapters, self._adapters)
        self._mark_computed(sequence, chunk.end - len(chunk.drafts))
        yield from self._take_scores(chunk) if sequence.pooling is None else self._take_hidden(chunk)
        yield from self._append_tokens(chunk, drawn)

    def _mark_computed(self, sequence: Sequence, end: int) -> None:
        start, sequence.computed = sequence.computed, end
        if sequence.probe:
            return  # not cached: no request has this prefix
        blocks = self._scheduler.blocks
        filled = range(start // blocks.size, end // blocks.size)
        if filled:
            chain_keys(sequence, blocks.size)
        for index in filled:
            blocks.cache(sequence.blocks[index], sequence.keys[index])

    def _take_scores(self, chunk: Chunk) -> Iterator[PromptLogprobs | Failed]:
        """Take in the log probabilities of a chunk's tokens, and deliver those of the prompt when it is complete."""
        sequence, rows = chunk.sequence, chunk.read
        if sequence.scores is None:
            return
        found = next(self._scores) if rows else ()
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

    def _take_hidden(self, chunk: Chunk) -> Iterator[Pooled | Failed]:
        """Take in what was pooled of a chunk, and deliver the vector when the prompt is complete."""
        sequence, rows = chunk.sequence, chunk.read
        if not rows:
            return
        found = next(self._pooled)
        sequence.read, sequence.hidden = rows.stop, found
        if found is None:
            yield self._fail_not_finite(sequence)
        elif rows.stop == sequence.prompt_length:
            self._scheduler.release(sequence)
            yield Pooled(sequence.id, found, sequence.cached, sequence.timing(self._now))

    def _append_tokens(
        self, chunk: Chunk, drawn: Seq[tuple[int | None, TokenLogprobs | None]]
    ) -> Iterator[Token | Failed]:
        """Append the tokens sampled for a chunk, up to the first that is not the draft for its place."""
        sequence, sampled = chunk.sequence, [token for token, _ in drawn]
        accepted = self._scheduler.speculation.record(chunk, sampled) if chunk.drafts else 0
        for token, logprobs in drawn[: accepted + 1]:
            if not sequence.leased:
                return  # the answer has ended
            self._mark_computed(sequence, len(sequence.tokens))
            if token is None:
                yield self._fail_not_finite(sequence)
            else:
                yield self._append_token(sequence, token, logprobs)
        if sequence.leased and None in sampled:
            self._scheduler.preempt(sequence)  # its blocks may hold keys and values that are not finite: take others

    def _append_token(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Token | Failed:
        sequence.append(token)
        if sequence.first_token is None:
            sequence.first_token = self._now
        finish = _finish(sequence, token)
        if sequence.matcher and (error := sequence.matcher.accept(token, last=finish == "stop")):
            self._scheduler.release(sequence)
            return Failed(sequence.id, f"The grammar of this answer cannot be followed further: {error}")
        if finish:
            self._scheduler.release(sequence)
        timing = sequence.timing(self._now) if finish else None
        return Token(sequence.id, token, finish, sequence.cached, self._logits, logprobs, timing)

    def _fail_not_finite(self, sequence: Sequence) -> Failed:
        self._scheduler.release(sequence)
        if not sequence.adaptation:
            return Failed(sequence.id, "The model's output was not finite.")
        return Failed(sequence.id, "The model's output was not finite: this adapter or mix cannot be used.", "adapter")


def _finish(sequence: Sequence, token: int) -> FinishReason | None:
    if token in sequence.sampling.stop_token_ids:
        return "stop"
    return "length" if sequence.output_length >= sequence.sampling.max_tokens else None
