"""Metrics of single adapters: at most so many series, those of the adapters that are used most.

Counts never move between series, so that each only grows: ``other`` keeps what was counted while an adapter had no
series of its own, and an adapter that gets its series back goes on where it was.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from time import monotonic

from prometheus_client.core import Metric

from adapters.errors import UnknownAdapter
from adapters.registry.registry import Registry
from server.metrics.families import Labels, Scraped, counters, summaries
from server.metrics.requests import EndedRequest

OTHER = "other"
"""Label of all adapters without a series of their own. An adapter of this name is one of them."""
LEAD = 2
"""How many times the requests of the least used adapter another one needs to take its series. With 1, adapters that
are used equally would take turns."""
HALF_LIFE = 3600.0
"""Seconds after which a request counts half in that comparison."""
MIN_REMEMBERED = 256
"""Adapters that are remembered without a look at which of them are still registered."""


@dataclass(slots=True)
class _Series:
    """What one series has counted."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By route and status."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    ended: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Used:
    """An adapter that has been used."""

    created: int
    """When its name was registered, in Unix time: another one means another adapter."""
    uses: float = 0.0
    """Requests, those of the last hours above all."""
    shown: bool = False
    """Whether it has a series of its own now."""
    series: _Series = field(default_factory=_Series)


class AdapterCollector(Scraped):
    """Requests, tokens and times by adapter; the base has its own name. Recorded on the event loop only."""

    def __init__(self, base: str, registry: Registry, most: int, clock: Callable[[], float] = monotonic) -> None:
        """``most``: adapters with series of their own. ``clock`` returns seconds."""
        self._base = base
        self._registry = registry
        self._most = most
        self._clock = clock
        self._halved = clock()
        self._of_base = _Series()
        self._other = _Series()
        self._used: dict[str, _Used] = {}
        self._shown = 0
        self._limit = MIN_REMEMBERED

    def __len__(self) -> int:
        """Return the number of adapters that are remembered."""
        return len(self._used)

    def responded(self, adapters: Collection[str], route: str, status: int) -> None:
        """Count an answer to a request that used ``adapters``."""
        for series in self._series(adapters, uses=1):
            series.requests[route, str(status)] += 1

    def first_token(self, adapters: Collection[str], seconds: float) -> None:
        """Record the first token of a request, ``seconds`` after it was submitted."""
        for series in self._series(adapters):
            series.first_tokens += 1
            series.first_token_seconds += seconds

    def ended(self, request: EndedRequest) -> None:
        """Record a request that has ended."""
        for series in self._series(request.adapters):
            series.prompt_tokens += request.prompt_tokens
            series.cached_tokens += request.cached_tokens
            series.output_tokens += request.output_tokens
            series.ended += 1
            series.seconds += request.seconds

    def update(self) -> None:
        """Forget removed adapters, and give the series to the adapters that are used most. Call it at each scrape."""
        self._forget()
        halvings = int((self._clock() - self._halved) // HALF_LIFE)
        if halvings:
            self._halved += halvings * HALF_LIFE
            for used in self._used.values():
                used.uses *= 0.5**halvings
        self._choose()

    def _forget(self) -> None:
        """Forget adapters that were removed."""
        for name in [name for name, used in self._used.items() if self._created(name) != used.created]:
            self._shown -= self._used.pop(name).shown
        self._limit = max(2 * len(self._used), MIN_REMEMBERED)

    def _choose(self) -> None:
        """Let adapters without a series take free ones, and those of adapters that are used much less."""
        hidden = [used for name, used in self._used.items() if not used.shown and used.uses and name != OTHER]
        shown = sorted((used for used in self._used.values() if used.shown), key=lambda used: used.uses)
        least = iter(shown)
        for used in sorted(hidden, key=lambda used: -used.uses):
            if self._shown < self._most:
                self._shown += 1
            elif (other := next(least, None)) is not None and used.uses > LEAD * other.uses:
                other.shown = False
            else:
                return
            used.shown = True

    def _series(self, adapters: Collection[str], uses: int = 0) -> Iterator[_Series]:
        """The series that count what happens with these adapters."""
        if not adapters:
            yield self._of_base
            return
        for name in adapters:
            used = self._used.get(name)
            if used is None:
                if len(self._used) >= self._limit:  # adapters may come and go although nobody scrapes
                    self._forget()
                used = self._used[name] = _Used(self._created(name) or 0)
                used.shown = self._shown < self._most and name != OTHER
                self._shown += used.shown
            used.uses += uses
            yield used.series if used.shown else self._other

    def _created(self, name: str) -> int | None:
        try:
            return self._registry.entry(name).created
        except UnknownAdapter:
            return None

    def collect(self) -> Iterator[Metric]:
        shown: dict[Labels, _Series] = {(name,): used.series for name, used in self._used.items() if used.shown}
        found: dict[Labels, _Series] = {(self._base,): self._of_base, **shown, (OTHER,): self._other}
        requests: dict[Labels, float] = {
            (*label, *key): count for label, series in found.items() for key, count in series.requests.items()
        }
        yield counters(
            "manylora_adapter_requests",
            "Answered requests of an adapter, or of the base",
            ["adapter", "route", "status"],
            requests,
        )
        labels = ["adapter"]
        prompt: dict[Labels, float] = {label: series.prompt_tokens for label, series in found.items()}
        cached: dict[Labels, float] = {label: series.cached_tokens for label, series in found.items()}
        output: dict[Labels, float] = {label: series.output_tokens for label, series in found.items()}
        yield counters("manylora_adapter_prompt_tokens", "Prompt tokens of ended requests", labels, prompt)
        yield counters("manylora_adapter_cached_tokens", "Those taken from the prefix cache", labels, cached)
        yield counters("manylora_adapter_output_tokens", "Answer tokens of ended requests", labels, output)
        yield summaries(
            "manylora_adapter_time_to_first_token_seconds",
            "From submission",
            labels,
            {label: (series.first_tokens, series.first_token_seconds) for label, series in found.items()},
        )
        yield summaries(
            "manylora_adapter_request_seconds",
            "From submission to the end of the answer",
            labels,
            {label: (series.ended, series.seconds) for label, series in found.items()},
        )
