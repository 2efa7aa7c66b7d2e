"""Generation: one request in the engine, seen from the event loop. Events come in, text goes out."""

from collections.abc import Sequence as Seq
from time import monotonic

from server.api.generation.mix import Mix
from server.api.service import Service
from server.engine.sequence import Event, Failed, FinishReason, Sequence, Token
from server.errors import Draining, EngineError
from server.metrics import Outcome
from server.text import Detokenizer, StopStrings


class Generation:
    """Submits a sequence when made; whoever made it calls ``close``, whatever happens."""

    def __init__(self, service: Service, sequence: Sequence, mix: Mix, stops: Seq[str]) -> None:
        """Takes over the leases of ``mix``. Raises what the engine's ``submit`` raises, and Draining."""
        self.id = sequence.id
        self.prompt_tokens = sequence.prompt_length
        self.output_tokens = 0
        self.cached_tokens = 0
        self.finish: FinishReason | None = None
        self.first_token: float | None = None
        """Seconds from submit to the first token, once it has come."""
        self.mix = mix
        self._service = service
        self._detokenizer = Detokenizer(service.codec)
        self._stops = StopStrings(stops)
        self._closed = False
        self._failed = False
        self._started = self._last = monotonic()
        try:
            self._inbox = service.event_router.open(self.id)
            service.engine.submit(sequence)
        except BaseException:
            self._leave()
            raise
        self._in_engine = True

    async def read(self) -> str:
        """The text that has come since the last call; waits for at least one step. May be empty.

        ``finish`` is set with the last. Raises EngineError where the engine gave up on the request, and
        Draining where it did so because the server ends.
        """
        events = await self._inbox.take()
        before = self.output_tokens
        text = "".join([self._take(event) for event in events])
        self._observe(before)
        if self.finish:
            self.close()
        return text

    def close(self) -> None:
        """The one way out: what still runs is aborted, and the leases go back. Calls after the first do nothing."""
        if self._closed:
            return
        self._closed = True
        if self._in_engine:
            self._service.engine.abort(self.id)
        self._leave()
        seconds = monotonic() - self._started
        self._service.metrics.ended(self.prompt_tokens, self.output_tokens, seconds)
        for alias, version in self._aliased:
            self._service.metrics.aliases.ended(alias, version, self.outcome, self.output_tokens, seconds)

    @property
    def outcome(self) -> Outcome:
        """How it has ended, once it has."""
        return "ok" if self.finish else "error" if self._failed else "cancelled"

    @property
    def _aliased(self) -> set[tuple[str, str]]:
        """The aliases it was asked for by, each with the version that it got."""
        return {(applied.alias, applied.name) for applied in self.mix.applied if applied.alias is not None}

    def _leave(self) -> None:
        self._service.event_router.close(self.id)
        self._service.registry.release(self.mix.leased)

    def _take(self, event: Event) -> str:
        if self.finish:
            return ""
        if isinstance(event, Failed):
            self._in_engine = False
            self._failed = True
            if self._service.event_router.draining:
                raise Draining(event.message, code="draining")
            raise EngineError(event.message)
        self.output_tokens += 1
        self.cached_tokens = event.cached
        if event.finish:
            self._in_engine = False
        return self._text(event)

    def _text(self, event: Token) -> str:
        # A stop token ends the answer and is no part of it.
        piece = "" if event.finish == "stop" else self._stops.push(self._detokenizer.push(event.token))
        if event.finish and not self._stops.found:
            piece += self._stops.push(self._detokenizer.flush())
            piece += "" if self._stops.found else self._stops.flush()
        self.finish = "stop" if self._stops.found else event.finish
        return piece

    def _observe(self, before: int) -> None:
        now = monotonic()
        fresh, gap = self.output_tokens - before, now - self._last
        if not before:
            self.first_token = now - self._started
            self._service.metrics.first_token(self.first_token)
            for alias, version in self._aliased:
                self._service.metrics.aliases.first_token(alias, version, self.first_token)
            fresh, gap = fresh - 1, 0.0  # what came along with the first waited for nothing
        if fresh:
            self._service.metrics.next_tokens(gap, fresh)
        self._last = now
