"""Generation: one request in the engine. Iterate over it to get the pieces of its choices.

Each step, the engine's thread hands its events to ``EventRouter.deliver``, which puts them into the queue of their
request on the event loop. Generation takes them from that queue; its choices decode them to text.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple, Self

from server.access.key import ApiKey
from server.access.usage import Meter
from server.access.usage_table import Tokens
from server.api.generation.adapters import LeasedAdapters
from server.api.generation.choice import Choice, ChoiceFailed
from server.api.generation.decoder import TextOptions
from server.api.generation.pieces import Piece
from server.engine.engine import Engine
from server.engine.event_router import EventRouter
from server.engine.sequence import Event, SamplingParams, Sequence, Timing
from server.metrics.metrics import Metrics
from server.metrics.requests import EndedRequest, RequestOutcome
from server.text.codec import Codec

Pieces = list[tuple[int, Piece]]
"""(index of a choice, its next piece). No choice is in it twice."""


class Progress(NamedTuple):
    """How far the prompts of a request are computed, in llama.cpp's words."""

    total: int
    """Tokens of all prompts, those of each choice counted."""
    cache: int
    """Those that were taken from the prefix cache."""
    processed: int
    """Those that are computed, or were taken from the prefix cache."""
    time_ms: int
    """Since the request was submitted."""


class Generation:
    """An asynchronous iterator over the pieces of all choices of one request, one item for each engine step.

    The constructor submits the sequences. Call :meth:`close` when done, in all cases.
    """

    def __init__(
        self,
        sequences: Seq[Sequence],
        adapters: LeasedAdapters,
        options: TextOptions,
        *,
        key: ApiKey,
        meter: Meter,
        prompts: int,
        codec: Codec,
        engine: Engine,
        event_router: EventRouter,
        metrics: Metrics,
    ) -> None:
        """Submit ``sequences`` and take over the leases of ``adapters``.

        The sequences of the first of the ``prompts`` come first; each prompt has equally many. Raises Draining,
        QueueFull, EngineError or InvalidRequest if one of them cannot be submitted; then none runs, and the leases are
        released.
        """
        self.id = sequences[0].id
        self.adapters = adapters
        self.key = key
        """Whose request it is."""
        self.choices = [Choice(sequence, codec, options, metrics) for sequence in sequences]
        self.choices_per_prompt = len(sequences) // prompts
        self.kept = options.kept
        """Special tokens whose text is part of the answers."""
        self.first_token: float | None = None
        """Seconds from submission to the first token; None until it has come."""
        self._meter = meter
        self._indices = {sequence.id: index for index, sequence in enumerate(sequences)}
        self._engine = engine
        self._event_router = event_router
        self._metrics = metrics
        self._last_ended: Choice | None = None
        self._unfinished = len(sequences)
        self._closed = False
        self._failed = False
        self._started = monotonic()
        try:
            self._queue = event_router.open(self._indices)
            for choice in self.choices:
                engine.submit(choice.sequence)
                choice.in_engine = True
        except BaseException:
            self._abort()
            self._release()
            raise
        meter.begin(adapters.label, self.computed_tokens)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Pieces:
        """Wait for at least one step, or for :meth:`wake`. Returns what has come since the last call.

        Raises EngineError if the engine failed the request, Draining if it did so because the server is shutting down,
        DeadlineExceeded if the request's timeout has passed, and GrammarTooComplex.
        """
        if self._closed:
            raise StopAsyncIteration
        events = await self._queue.take()
        try:
            if len(self.choices) == 1:  # the usual request
                pieces = [(0, self.choices[0].take(events))] if events else []
            else:
                pieces = [(index, self.choices[index].take(its)) for index, its in self._by_choice(events).items()]
        except ChoiceFailed as error:
            self._failed = True  # one that fails is the end of the request
            raise self._event_router.error(error.event) from error
        if self.first_token is None and self.output_tokens:
            self._measure_first()
        for index, piece in pieces:
            if piece.finish:
                self._finish(self.choices[index])
        return pieces

    @property
    def last_token(self) -> float:
        """When the last token of any choice came, or the request was submitted, by ``time.monotonic()``."""
        return max([self._started, *(choice.last_token for choice in self.choices if choice.last_token is not None)])

    @property
    def behind(self) -> int:
        """How much has come that was not taken: tokens, and log probabilities in their places."""
        return len(self._queue) * (1 + (self.choices[0].sequence.sampling.logprobs or 0))

    def wake(self) -> None:
        """Let the iterator return, without pieces if none have come."""
        self._queue.wake()

    def close(self) -> None:
        """Abort what still runs, release the leases, and update the metrics. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._meter.end()  # first: the engine forgets what it has computed of what is aborted
        self._abort()
        self._release()
        self._record()

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close it if the block raises."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(choice.prompt_tokens for choice in self.choices[:: self.choices_per_prompt])

    @property
    def cached_tokens(self) -> int:
        """Tokens of all prompts that were taken from the prefix cache."""
        return sum(choice.cached_tokens for choice in self.choices[:: self.choices_per_prompt])

    @property
    def output_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(choice.output_tokens for choice in self.choices)

    def computed_tokens(self) -> Tokens:
        """Return the tokens that were computed so far, for the prompts or the answers. Any thread may call it."""
        firsts = self.choices[:: self.choices_per_prompt]
        prompt = sum(choice.computed_prompt_tokens for choice in firsts)
        return Tokens(prompt, sum(choice.sequence.cached for choice in firsts), self.output_tokens)

    @property
    def timing(self) -> Timing | None:
        """Where the time of the choice went that ended last; None until one has."""
        return self._last_ended.timing if self._last_ended else None

    @property
    def spent(self) -> tuple[float, Timing]:
        """When the choice that ended last was submitted, by ``time.monotonic()``, and where its time went.

        If none has ended, those of the first choice so far.
        """
        choice = self._last_ended or self.choices[0]
        return choice.sequence.arrived, choice.timing or choice.sequence.timing(monotonic())

    @property
    def sampling(self) -> SamplingParams:
        """Sampling parameters of the first choice."""
        return self.choices[0].sequence.sampling

    @property
    def finishes(self) -> list[str]:
        """Why each choice that has ended did so."""
        return [choice.finish.reason for choice in self.choices if choice.finish]

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [choice.prompt for choice in self.choices[:: self.choices_per_prompt]]

    @property
    def answers(self) -> list[list[int]]:
        """The token ids that the engine has sampled for each choice."""
        return [list(choice.sequence.output) for choice in self.choices]

    @property
    def progress(self) -> Progress:
        """How far the prompts are computed now. Reads what the engine's thread writes, which may be a step ahead."""
        sequences = [choice.sequence for choice in self.choices]
        return Progress(
            sum(sequence.prompt_length for sequence in sequences),
            sum(sequence.cached for sequence in sequences),
            sum(min(sequence.computed, sequence.prompt_length) for sequence in sequences),
            round((monotonic() - self._started) * 1000),
        )

    @property
    def ended(self) -> bool:
        """Whether all choices are complete."""
        return self._unfinished == 0

    @property
    def outcome(self) -> RequestOutcome:
        """How the request ended. Valid once it has."""
        return "ok" if self.ended else "error" if self._failed else "cancelled"

    def _abort(self) -> None:
        for choice in self.choices:
            self._end(choice)

    def _finish(self, choice: Choice) -> None:
        self._last_ended = choice
        self._unfinished -= 1
        self._end(choice)
        if self.ended:
            self.close()

    def _end(self, choice: Choice) -> None:
        """Abort a choice if it still runs."""
        if choice.in_engine:
            choice.in_engine = False
            self._engine.abort(choice.sequence.id)

    def _release(self) -> None:
        self._event_router.close(*self._indices)
        self.adapters.release()

    def _by_choice(self, events: list[Event]) -> dict[int, list[Event]]:
        """Events by the index of their choice, without those of choices that have ended."""
        found: dict[int, list[Event]] = {}
        for event in events:
            index = self._indices[event.sequence_id]
            if not self.choices[index].finish:
                found.setdefault(index, []).append(event)
        return found

    def _measure_first(self) -> None:
        self.first_token = monotonic() - self._started
        self._metrics.first_token(self.first_token, self.adapters.names, self.adapters.aliases)

    def _record(self) -> None:
        """Update the metrics, when it has ended."""
        now = monotonic()
        for choice in self.choices:
            if choice.last_token is None:  # else its wait was recorded with its first token
                sequence = choice.sequence
                computed = choice.finish is not None
                self._metrics.waited(sequence.timing(now), adapted=bool(sequence.adaptation), computed=computed)
        self._metrics.ended(
            EndedRequest(
                self.outcome,
                now - self._started,
                self.prompt_tokens,
                self.cached_tokens,
                self.output_tokens,
                self.adapters.names,
                self.adapters.aliases,
            )
        )
