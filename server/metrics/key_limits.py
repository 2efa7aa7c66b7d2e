"""Metrics of the limits of keys."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from server.access.limits import LimitName
from server.metrics.families import Scraped, counters


class KeyLimitCollector(Scraped):
    """What was refused, by the limit that was reached; never by the key, of which there may be any number."""

    def __init__(self, refused: Mapping[LimitName, int]) -> None:
        """``refused``: name of a limit -> requests so far. Read at each scrape."""
        self._refused = refused

    def collect(self) -> Iterator[Metric]:
        yield counters(
            "manylora_key_limit_refusals",
            "Requests refused because their key had reached a limit",
            ["limit"],
            {(limit,): number for limit, number in self._refused.items()},
        )
