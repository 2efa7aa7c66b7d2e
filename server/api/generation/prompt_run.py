"""PromptRun: the sequences of a request that asks about its prompts: for vectors or log probabilities, not for text."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from itertools import islice
from time import monotonic

from server.api.generation.adapters import LeasedAdapters
from server.api.schemas.inputs import TextOrTokens
from server.api.service import Service
from server.engine.sequence import Event, Failed, Pooled, PromptLogprobs, Sequence, Token, is_last
from server.errors import Draining, EngineError
from server.metrics import RequestOutcome
from server.text.codec import LONG_TEXT, Codec

Result = Pooled | PromptLogprobs


async def encode_prompts(codec: Codec, prompts: Seq[TextOrTokens], param: str) -> list[list[int]]:
    """Return the token ids of each prompt. Raises InvalidRequest for ``param`` if one has no tokens or unknown ids."""

    def encode() -> list[list[int]]:
        return [codec.encode_prompt(prompt, param) for prompt in prompts]

    return await asyncio.to_thread(encode) if sum(map(len, prompts)) > LONG_TEXT else encode()


class PromptRun:
    """An asynchronous iterator over the results of some sequences, in their order.

    Only as many sequences as run in one batch are in the engine at a time, so that a request of thousands does not
    fill its queue. The first ones are submitted before the first wait. Call :meth:`close` when done, in all cases.
    """

    first_token: float | None = None
    output_tokens = 0
    """For the access log: such a request has no answer."""

    def __init__(self, sequences: Seq[Sequence], adapters: LeasedAdapters, service: Service) -> None:
        """Take over the leases of ``adapters``."""
        self.adapters = adapters
        self.prompt_tokens = sum(sequence.prompt_length for sequence in sequences)
        self.ended = False
        """Whether all results have come."""
        self._ids = [sequence.id for sequence in sequences]
        self._left = iter(sequences)
        self._window = service.settings.max_batch_sequences
        self._engine = service.engine
        self._event_router = service.event_router
        self._metrics = service.metrics
        self._running: set[str] = set()
        """Ids of the sequences in the engine."""
        self._results: dict[str, Result] = {}
        """Those that have come and were not yielded yet, by sequence id."""
        self._failed = False
        self._closed = False
        self._started = monotonic()

    async def __aiter__(self) -> AsyncIterator[Result]:
        """Submit the sequences and yield the result of each.

        Raises Draining, QueueFull, EngineError or InvalidRequest if one cannot be submitted, and EngineError or
        Draining if the engine fails one.
        """
        queue = self._event_router.open(self._ids)
        for sequence in islice(self._left, self._window):
            self._submit(sequence)
        for sequence_id in self._ids:
            while sequence_id not in self._results:
                for event in await queue.take():
                    self._take(event)
            yield self._results.pop(sequence_id)
        self.ended = True

    def close(self) -> None:
        """Abort the sequences that still run, release the leases, and update the metrics. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for sequence_id in self._running:
            self._engine.abort(sequence_id)
        self._event_router.close(*self._ids)
        self.adapters.release()
        seconds = monotonic() - self._started
        self._metrics.ended(self.prompt_tokens, 0, seconds)
        for alias, version in self.adapters.aliases:
            self._metrics.aliases.ended(alias, version, self.outcome, 0, seconds)

    @property
    def outcome(self) -> RequestOutcome:
        """How the request ended. Valid once it has."""
        return "ok" if self.ended else "error" if self._failed else "cancelled"

    def _submit(self, sequence: Sequence) -> None:
        self._engine.submit(sequence)
        self._running.add(sequence.id)

    def _take(self, event: Event) -> None:
        """Take an event; if its sequence has ended with it, submit another."""
        assert not isinstance(event, Token), "these sequences have no answer"
        if is_last(event):
            self._running.discard(event.sequence_id)
            if (following := next(self._left, None)) is not None:
                self._submit(following)
        if isinstance(event, Failed):
            self._failed = True
            raise (
                Draining(event.message, code="draining") if self._event_router.draining else EngineError(event.message)
            )
        self._results[event.sequence_id] = event
