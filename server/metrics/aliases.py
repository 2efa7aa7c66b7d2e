"""Metrics by alias and version, to compare the versions of a canary."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import Metric

from adapters.errors import UnknownAdapter
from adapters.registry.names import parse_reference
from adapters.registry.registry import Registry
from server.engine.stats import Distribution
from server.metrics.adapters import OTHER
from server.metrics.families import Labels, Scraped, counters, histograms
from server.metrics.requests import REQUEST_BOUNDS, EndedRequest


@dataclass(slots=True)
class _Series:
    """What was counted for one alias and version."""

    requests: Counter[str] = field(default_factory=Counter)
    """By outcome."""
    output_tokens: int = 0
    first_token: Distribution = field(default_factory=lambda: Distribution(REQUEST_BOUNDS))
    seconds: Distribution = field(default_factory=lambda: Distribution(REQUEST_BOUNDS))


class AliasCollector(Scraped):
    """Requests by alias and by the version that was chosen for it.

    A pair is kept as long as the version is a target of the alias. Those that are used when ``most`` have series are
    counted together, and never elsewhere. Recorded on the event loop only.
    """

    def __init__(self, registry: Registry, most: int) -> None:
        """``most``: pairs with series of their own."""
        self._registry = registry
        self._most = most
        self._tracked: dict[tuple[str, str], _Series] = {}
        self._other = _Series()

    def first_token(self, alias: str, version: str, seconds: float) -> None:
        """Record the first token of a request, ``seconds`` after it was submitted."""
        self._series(alias, version).first_token.add(seconds)

    def ended(self, alias: str, version: str, request: EndedRequest) -> None:
        """Record a request that has ended."""
        series = self._series(alias, version)
        series.requests[request.outcome] += 1
        series.output_tokens += request.output_tokens
        series.seconds.add(request.seconds)

    def update(self) -> None:
        """Forget aliases and targets that do not exist any more. Call it at each scrape."""
        for pair in [pair for pair in self._tracked if not self._is_current(*pair)]:
            del self._tracked[pair]

    def _series(self, alias: str, version: str) -> _Series:
        series = self._tracked.get((alias, version))
        if series is not None:
            return series
        if len(self._tracked) >= self._most:
            return self._other
        return self._tracked.setdefault((alias, version), _Series())

    def _is_current(self, alias: str, version: str) -> bool:
        """Whether the version is a target of the alias, or would be after a rollback."""
        try:
            self._registry.version(version)
            targets = self._registry.alias(alias).targets
        except UnknownAdapter:
            return False
        meant = parse_reference(version)
        return any(t.adapter == meant.name and t.version in (None, meant.version) for t in targets)

    def collect(self) -> Iterator[Metric]:
        labels = ["alias", "version"]
        found = dict(self._tracked)
        if self._other.requests:
            found[OTHER, OTHER] = self._other
        requests: dict[Labels, float] = {
            (*pair, outcome): count for pair, series in found.items() for outcome, count in series.requests.items()
        }
        yield counters("manylora_alias_requests", "Requests that have ended", [*labels, "outcome"], requests)
        tokens: dict[Labels, float] = {pair: series.output_tokens for pair, series in found.items()}
        yield counters("manylora_alias_output_tokens", "Answer tokens", labels, tokens)
        yield histograms(
            "manylora_alias_time_to_first_token_seconds",
            "From submission",
            labels,
            {pair: series.first_token for pair, series in found.items()},
        )
        yield histograms(
            "manylora_alias_request_seconds",
            "From submission to the end of the answer",
            labels,
            {pair: series.seconds for pair, series in found.items()},
        )
