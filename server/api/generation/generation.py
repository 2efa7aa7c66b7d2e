"""Generation: one request in the engine. Iterate over it to get the text of the answer.

Each step, the engine's thread hands its events to ``EventRouter.deliver``, which puts them into the queue of their
request on the event loop. Generation takes them from that queue and decodes them to text.
"""

from collections.abc import Sequence as Seq
from time import monotonic
from typing import Self

from server.api.generation.adapters import LeasedAdapters
from server.engine.engine import Engine
from server.engine.event_router import EventRouter
from server.engine.sequence import Event, Failed, FinishReason, Sequence, Token
from server.errors import Draining, EngineError
from server.metrics import Metrics, RequestOutcome
from server.text.codec import Codec
from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings


class Generation:
    """An asynchronous iterator over the text of one answer, one piece for each engine step.

    The constructor submits the sequence. Call :meth:`close` when done, in all cases.
    """

    def __init__(
        self,
        sequence: Sequence,
        adapters: LeasedAdapters,
        stops: Seq[str],
        *,
        codec: Codec,
        engine: Engine,
        event_router: EventRouter,
        metrics: Metrics,
    ) -> None:
        """Submit ``sequence`` and take over the leases of ``adapters``.

        Raises Draining, QueueFull, EngineError or InvalidRequest if the sequence cannot be submitted; the leases are
        released then.
        """
        self.id = sequence.id
        self.adapters = adapters
        self.prompt_tokens = sequence.prompt_length
        self.output_tokens = 0
        self.cached_tokens = 0
        self.finish: FinishReason | None = None
        """Why the answer ended; None until it has."""
        self.first_token: float | None = None
        """Seconds from submission to the first token; None until it has come."""
        self._engine = engine
        self._event_router = event_router
        self._metrics = metrics
        self._detokenizer = Detokenizer(codec)
        self._stops = StopStrings(stops)
        self._closed = False
        self._failed = False
        self._started = self._last = monotonic()
        try:
            self._queue = event_router.open(self.id)
            engine.submit(sequence)
        except BaseException:
            self._release()
            raise
        self._in_engine = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """Wait for at least one step, and return the text since the last call, which may be empty.

        Sets ``finish`` with the last piece. Raises EngineError if the engine failed the request, and Draining if it
        did so because the server is shutting down.
        """
        if self._closed:
            raise StopAsyncIteration
        events = await self._queue.take()
        before = self.output_tokens
        text = "".join([self._take(event) for event in events])
        self._measure(before)
        if self.finish:
            self.close()
        return text

    def close(self) -> None:
        """Abort the sequence if it still runs, release the leases, and update the metrics. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._in_engine:
            self._engine.abort(self.id)
        self._release()
        seconds = monotonic() - self._started
        self._metrics.ended(self.prompt_tokens, self.output_tokens, seconds)
        for alias, version in self.adapters.aliases:
            self._metrics.aliases.ended(alias, version, self.outcome, self.output_tokens, seconds)

    @property
    def outcome(self) -> RequestOutcome:
        """How the request ended. Valid once it has."""
        return "ok" if self.finish else "error" if self._failed else "cancelled"

    def _release(self) -> None:
        self._event_router.close(self.id)
        self.adapters.release()

    def _take(self, event: Event) -> str:
        if self.finish:  # a stop string was found: later tokens of the same batch of events do not count
            return ""
        if isinstance(event, Failed):
            self._in_engine = False
            self._failed = True
            raise (
                Draining(event.message, code="draining") if self._event_router.draining else EngineError(event.message)
            )
        assert isinstance(event, Token), "the request asks for no other events"
        self.output_tokens += 1
        self.cached_tokens = event.cached
        self._in_engine = event.finish is None
        return self._decode(event)

    def _decode(self, event: Token) -> str:
        # A stop token ends the answer but is not part of its text.
        piece = "" if event.finish == "stop" else self._stops.push(self._detokenizer.push(event.token))
        if event.finish and not self._stops.found:
            piece += self._stops.push(self._detokenizer.flush())
            piece += "" if self._stops.found else self._stops.flush()
        self.finish = "stop" if self._stops.found else event.finish
        return piece

    def _measure(self, before: int) -> None:
        """Record the latency of the tokens that have come since there were ``before``."""
        now = monotonic()
        new, gap = self.output_tokens - before, now - self._last
        if not before:
            self.first_token = now - self._started
            self._metrics.first_token(self.first_token)
            for alias, version in self.adapters.aliases:
                self._metrics.aliases.first_token(alias, version, self.first_token)
            new, gap = new - 1, 0.0  # tokens that came together with the first one had no wait of their own
        if new:
            self._metrics.next_tokens(gap, new)
        self._last = now
