"""Metrics of requests for answers, vectors and scores: tokens, and where the time goes."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import Metric

from server.engine.sequence import Timing
from server.engine.stats import Distribution
from server.metrics.families import Labels, Scraped, counter, counters, histogram

RequestOutcome = Literal["ok", "error", "cancelled"]
"""How a request ended. cancelled: the client disconnected."""

TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WAIT_BOUNDS = (0.001, 0.0025, 0.005, *REQUEST_BOUNDS)


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What is recorded of a request when it has ended."""

    outcome: RequestOutcome
    seconds: float
    """From its submission."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    adapters: Collection[str]
    """Names of the adapters that it used, without versions; empty for the base."""
    aliases: Collection[tuple[str, str]]
    """Pairs of an alias that it used and the version that this was resolved to."""


class RequestCollector(Scraped):
    """All requests of one server. Recorded on the event loop only."""

    def __init__(self) -> None:
        self._outcomes: Counter[Labels] = Counter()
        self._prompt_tokens = self._output_tokens = 0
        self._queue = Distribution(WAIT_BOUNDS)
        self._adapter_wait = Distribution(WAIT_BOUNDS)
        self._prefill = Distribution(WAIT_BOUNDS)
        self._first_token = Distribution(REQUEST_BOUNDS)
        self._seconds = Distribution(REQUEST_BOUNDS)
        self.between_tokens = Distribution(TOKEN_BOUNDS)

    def waited(self, timing: Timing, *, adapted: bool, computed: bool) -> None:
        """Record how long a sequence waited, and how long its prompt took, if that was ``computed``.

        ``adapted``: whether it has adapters.
        """
        self._queue.add(timing.queue)
        if adapted:
            self._adapter_wait.add(timing.load)
        if computed:
            self._prefill.add(timing.prefill)

    def first_token(self, seconds: float) -> None:
        """Record the first token of a request, ``seconds`` after it was submitted."""
        self._first_token.add(seconds)

    def ended(self, request: EndedRequest) -> None:
        """Record a request that has ended."""
        self._outcomes[(request.outcome,)] += 1
        self._prompt_tokens += request.prompt_tokens
        self._output_tokens += request.output_tokens
        self._seconds.add(request.seconds)

    def collect(self) -> Iterator[Metric]:
        yield counters("manylora_requests", "Requests that have ended, by outcome", ["outcome"], self._outcomes)
        yield counter("manylora_prompt_tokens", "Prompt tokens of ended requests", self._prompt_tokens)
        yield counter("manylora_output_tokens", "Answer tokens of ended requests", self._output_tokens)
        yield histogram("manylora_queue_seconds", "From a sequence's arrival to its first step", self._queue)
        yield histogram("manylora_adapter_wait_seconds", "A sequence's wait for its adapters", self._adapter_wait)
        yield histogram("manylora_prefill_seconds", "From a sequence's first step to its first token", self._prefill)
        yield histogram("manylora_time_to_first_token_seconds", "From submission", self._first_token)
        yield histogram("manylora_time_between_tokens_seconds", "Between two tokens of a sequence", self.between_tokens)
        yield histogram("manylora_request_seconds", "From submission to the end of the answer", self._seconds)
