"""Metrics of HTTP requests."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric

from server.metrics.families import Labels, Scraped, counters

METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
OTHER = "other"
"""Label of a method that HTTP does not know, and of a path that no route takes: clients may make up any."""


class HttpCollector(Scraped):
    """Answers, by method, route and status. Recorded on the event loop only."""

    def __init__(self) -> None:
        self._answers: Counter[Labels] = Counter()

    def responded(self, method: str, route: str | None, status: int) -> None:
        """Count an answer. ``route``: the template of the route's path, None where no route took the request."""
        self._answers[(method if method in METHODS else OTHER, route or OTHER, str(status))] += 1

    def collect(self) -> Iterator[Metric]:
        yield counters(
            "manylora_http_requests",
            "HTTP requests, by the template of their route; status 499: the client left before the answer began",
            ["method", "route", "status"],
            self._answers,
        )
