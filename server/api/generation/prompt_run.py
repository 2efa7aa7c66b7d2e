"""PromptRun: the sequences of a request that asks about its prompts: for vectors or log probabilities, not for text."""

from collections.abc import AsyncIterator, Callable, Coroutine
from collections.abc import Sequence as Seq
from itertools import islice
from time import monotonic, time
from typing import Any, Self, TypeVar
from uuid import uuid4

from starlette.requests import Request

from server.access.key import ApiKey
from server.access.usage import METER, Meter
from server.access.usage_table import Tokens
from server.api.generation.adapters import LeasedAdapters, lease_adapters
from server.api.http.disconnect import until_disconnect
from server.api.schemas.generation import AdaptedRequest
from server.api.service import Service
from server.engine.sequence import (
    Adaptation,
    Event,
    Failed,
    Pooled,
    PromptLogprobs,
    SamplingParams,
    Sequence,
    Timing,
    Token,
    is_last,
)
from server.errors import ContextOverflow
from server.metrics.requests import EndedRequest, RequestOutcome

Result = Pooled | PromptLogprobs
MakeSequence = Callable[[str, list[int], Adaptation], Sequence]
"""(id, tokens, adapters) -> a sequence that asks for what the request wants to know."""
T = TypeVar("T")


class PromptRun:
    """An asynchronous iterator over the results of some sequences, in their order.

    Only as many sequences as run in one batch are in the engine at a time, so that a request of thousands does not
    fill its queue. The first ones are submitted before the first wait. Call :meth:`close` when done, in all cases.
    """

    # For the request's log line and its trace: such a request has no answer.
    first_token: float | None = None
    output_tokens = 0
    sampling: SamplingParams | None = None
    finishes: Seq[str] = ()
    answers: Seq[list[int]] = ()

    def __init__(
        self,
        id_: str,
        sequences: Seq[Sequence],
        adapters: LeasedAdapters,
        service: Service,
        key: ApiKey,
        meter: Meter,
    ) -> None:
        """Take over the leases of ``adapters``."""
        self.id = id_
        self.adapters = adapters
        self.key = key
        self.prompt_tokens = sum(sequence.prompt_length for sequence in sequences)
        self.cached_tokens = 0
        """Prompt tokens that were taken from the prefix cache."""
        self.spent: tuple[float, Timing] | None = None
        """When the sequence whose result came last was submitted, and where its time went; None until one has come."""
        self.ended = False
        """Whether all results have come."""
        self._sequences = sequences
        self._ids = [sequence.id for sequence in sequences]
        self._left = iter(sequences)
        self._window = service.settings.max_batch_sequences
        self._engine = service.engine
        self._event_router = service.event_router
        self._metrics = service.metrics
        self._running: dict[str, Sequence] = {}
        """The sequences in the engine, by id."""
        self._computed = Tokens()
        """Tokens of the prompts that are complete."""
        self._meter = meter
        self._results: dict[str, Result] = {}
        """Those that have come and were not yielded yet, by sequence id."""
        self._failed = False
        self._closed = False
        self._started = monotonic()
        meter.begin(adapters.label, lambda: self._computed)

    @classmethod
    async def of(
        cls,
        service: Service,
        key: ApiKey,
        request: AdaptedRequest,
        prompts: Seq[list[int]],
        make: MakeSequence,
        *,
        prefix: str,
        param: str,
    ) -> Self:
        """Lease the adapters of a request and return the run of its prompts, lists of token ids.

        ``prefix`` begins the answer's id. Raises ContextOverflow for the field ``param`` if a prompt is too long,
        RateLimited, and the errors of :func:`lease_adapters`.
        """
        context = service.base.max_model_len
        for prompt in prompts:
            if len(prompt) > context:
                raise ContextOverflow(context, len(prompt), 0, param)
        meter = METER.get()
        await meter.reserve(sum(map(len, prompts)))
        adapters = lease_adapters(service, key, request)
        id_, adaptation = f"{prefix}-{uuid4().hex}", adapters.adaptation
        sequences = [make(f"{id_}-{index}", prompt, adaptation) for index, prompt in enumerate(prompts)]
        for sequence in sequences:
            sequence.tenant, sequence.weight = key.id, key.weight
            sequence.priority, sequence.deadline = request.urgency, request.deadline
        return cls(id_, sequences, adapters, service, key, meter)

    async def complete(self, http: Request, work: Coroutine[Any, Any, T]) -> T:
        """Return what ``work`` makes of the results, and close the run; raise ClientDisconnect if the client leaves."""
        http.state.generation = self  # for the access log
        try:
            return await until_disconnect(http.receive, work)
        finally:
            self.close()

    def fields(self, model: str) -> dict[str, Any]:
        """Return the fields of the answer that are not about a single prompt. ``model``: its name in the request."""
        return {
            "id": self.id,
            "object": "list",
            "created": int(time()),
            "model": model,
            "adapter": self.adapters.to_json(),
            "usage": {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens},
        }

    async def __aiter__(self) -> AsyncIterator[Result]:
        """Submit the sequences and yield the result of each.

        Raises Draining, QueueFull, EngineError or InvalidRequest if one cannot be submitted, and what
        :meth:`EventRouter.error <server.engine.event_router.EventRouter.error>` returns if the engine fails one.
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
        for sequence in self._running.values():
            self._count(sequence, min(sequence.computed, sequence.prompt_length))
        self._meter.end()
        for sequence_id in self._running:
            self._engine.abort(sequence_id)
        self._event_router.close(*self._ids)
        self.adapters.release()
        self._record()

    def _record(self) -> None:
        """Update the metrics, when it has ended."""
        now, adapters = monotonic(), self.adapters
        for sequence in self._running.values():
            self._metrics.waited(sequence.timing(now), adapted=bool(adapters.applied), computed=False)
        self._metrics.ended(
            EndedRequest(
                self.outcome,
                now - self._started,
                self.prompt_tokens,
                self.cached_tokens,
                0,
                adapters.names,
                adapters.aliases,
            )
        )

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [sequence.tokens for sequence in self._sequences]

    @property
    def outcome(self) -> RequestOutcome:
        """How the request ended. Valid once it has."""
        return "ok" if self.ended else "error" if self._failed else "cancelled"

    def _submit(self, sequence: Sequence) -> None:
        self._engine.submit(sequence)
        self._running[sequence.id] = sequence

    def _take(self, event: Event) -> None:
        """Take the event of a sequence, which ends with it, and submit another."""
        assert not isinstance(event, Token), "these sequences have no answer"
        assert is_last(event), "each of them has one event"
        sequence = self._running.pop(event.sequence_id)
        if not isinstance(event, Failed):
            self._count(sequence, sequence.prompt_length)
        if (following := next(self._left, None)) is not None:
            self._submit(following)
        if isinstance(event, Failed):
            self._failed = True
            raise self._event_router.error(event)
        if event.timing is not None:
            self.spent = sequence.arrived, event.timing
            self._metrics.waited(event.timing, adapted=bool(self.adapters.applied))
        self.cached_tokens += event.cached
        self._results[event.sequence_id] = event

    def _count(self, sequence: Sequence, prompt_tokens: int) -> None:
        before = self._computed
        self._computed = Tokens(before.prompt + prompt_tokens, before.cached + sequence.cached)
