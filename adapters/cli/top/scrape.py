"""One answer of ``/metrics``, and what changed between two."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Scrape:
    """The series of a server at one moment."""

    at: float
    """Seconds of ``time.monotonic``."""
    series: Mapping[str, list[tuple[Labels, float]]]
    """Name of a sample, as ``manylora_request_seconds_bucket``, -> its series."""

    def has(self, name: str) -> bool:
        """Whether the server has this metric."""
        return name in self.series

    def value(self, name: str, **labels: str) -> float | None:
        """Return the sum of the series with these labels; None if the server has no such metric."""
        if name not in self.series:
            return None
        return sum(value for found, value in self.series[name] if labels.items() <= found.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of a metric's series by a label."""
        sums: dict[str, float] = defaultdict(float)
        for found, value in self.series.get(name, ()):
            sums[found.get(label, "")] += value
        return dict(sums)

    def label(self, name: str, label: str) -> str | None:
        """Return a label of a metric that has one series; None if the server has no such metric."""
        return next((found.get(label) for found, _ in self.series.get(name, ())), None)


def parse_scrape(text: str, at: float) -> Scrape:
    """Parse Prometheus' text format. Raises ValueError for anything else."""
    series: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series[sample.name].append((sample.labels, sample.value))
    return Scrape(at, dict(series))


@dataclass(frozen=True, slots=True)
class Change:
    """What happened between two scrapes. A counter that is lower than before began again: its server was restarted."""

    before: Scrape
    now: Scrape

    @property
    def seconds(self) -> float:
        """Seconds between the scrapes."""
        return self.now.at - self.before.at

    def rate(self, name: str, **labels: str) -> float | None:
        """Return how much a counter grew per second; None if the server has no such metric."""
        now = self.now.value(name, **labels)
        if now is None or not self.seconds:
            return None
        return _grown(self.before.value(name, **labels) or 0.0, now) / self.seconds

    def rate_by(self, name: str, label: str) -> dict[str, float]:
        """Return the rates of a counter by a label."""
        before = self.before.by(name, label)
        grown = {value: _grown(before.get(value, 0.0), now) for value, now in self.now.by(name, label).items()}
        return {value: count / self.seconds if self.seconds else 0.0 for value, count in grown.items()}

    def mean(self, name: str, **labels: str) -> float | None:
        """Return the mean of what a histogram or summary observed; None if that was nothing."""
        count = self.rate(f"{name}_count", **labels)
        total = self.rate(f"{name}_sum", **labels)
        return total / count if count and total is not None else None

    def quantile(self, name: str, share: float) -> float | None:
        """Return a quantile of what a histogram observed, 0 < ``share`` < 1; None if that was nothing.

        Straight within a bucket, as Prometheus' ``histogram_quantile``; the last bound for what lies above it.
        """
        grown = {float(bound): rate for bound, rate in self.rate_by(f"{name}_bucket", "le").items()}
        bounds = sorted(grown)
        if not bounds or not grown[bounds[-1]]:
            return None
        wanted, lower, below = share * grown[bounds[-1]], 0.0, 0.0
        for bound in bounds:
            if grown[bound] >= wanted:
                if math.isinf(bound):
                    return lower
                return lower + (bound - lower) * (wanted - below) / (grown[bound] - below)
            lower, below = bound, grown[bound]
        return lower


def _grown(before: float, now: float) -> float:
    return now if now < before else now - before
