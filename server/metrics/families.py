"""Metric families made of numbers that are kept elsewhere, when Prometheus scrapes."""

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.engine.stats import Distribution

Labels = tuple[str, ...]
"""The values of the labels of one series, in the order of their names."""


class Scraped(Collector):
    """A collector that reads its numbers when Prometheus scrapes."""

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering the collector reads no numbers."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        raise NotImplementedError


def gauge(name: str, meaning: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(name, meaning, float(value))


def counter(name: str, meaning: str, value: float) -> Metric:
    """A counter without labels. ``name`` is without ``_total``."""
    return CounterMetricFamily(name, meaning, float(value))


def counters(name: str, meaning: str, labels: Seq[str], values: Mapping[Labels, float]) -> Metric:
    """A counter with these labels, by their values."""
    family = CounterMetricFamily(name, meaning, labels=labels)
    for each, value in values.items():
        family.add_metric(each, float(value))
    return family


def histograms(name: str, meaning: str, labels: Seq[str], values: Mapping[Labels, Distribution]) -> Metric:
    """A histogram with these labels, by their values."""
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for each, distribution in values.items():
        bounds = [*map(floatToGoString, distribution.bounds), "+Inf"]
        family.add_metric(each, list(zip(bounds, distribution.cumulative, strict=True)), distribution.sum)
    return family


def histogram(name: str, meaning: str, value: Distribution) -> Metric:
    """A histogram without labels."""
    return histograms(name, meaning, (), {(): value})


def summaries(name: str, meaning: str, labels: Seq[str], values: Mapping[Labels, tuple[int, float]]) -> Metric:
    """A summary of (count, sum) with these labels, by their values."""
    family = SummaryMetricFamily(name, meaning, labels=labels)
    for each, (count, total) in values.items():
        family.add_metric(each, count, total)
    return family
