"""Metrics of the program: which version serves which base, with which kernels."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client.core import InfoMetricFamily, Metric

from server.metrics.families import Scraped


@dataclass(frozen=True, slots=True)
class Build:
    """What serves. None of it changes while the process runs."""

    base: str
    """Name of the base."""
    fingerprint: str
    """Of the base."""
    cpu_variant: str
    """The CPU kernels; ``torch`` without any, and ``cuda`` on a GPU."""


class BuildCollector(Scraped):
    """The version, the base and the kernels, as labels."""

    def __init__(self, build: Build) -> None:
        self._labels = {
            "version": version("manylora"),
            "base": build.base,
            "fingerprint": build.fingerprint,
            "cpu_variant": build.cpu_variant,
        }

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("manylora_build", "What serves", self._labels)
