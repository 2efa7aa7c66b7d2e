"""Thresholds: conditions that make a run fail, as ``ttft_p95_ms>500``, for all workloads or for those named."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from loadtests.errors import BadOption
from loadtests.report.metrics import METRICS, WorkloadMetrics
from loadtests.workload.arrivals import ClosedLoop
from loadtests.workload.workload import Workload

_FORM = re.compile(r"\s*(?:(?P<work>\S.*?)\s*/\s*)?(?P<metric>\w+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)\s*")
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class _WorkloadFilter:
    """Which workloads have a metric."""

    description: str
    has: Callable[[Workload], bool]


_WITH_ADAPTERS = _WorkloadFilter("workloads with adapters", lambda work: work.adapters > 0)
_OPEN = _WorkloadFilter("open loops", lambda work: not isinstance(work.arrivals, ClosedLoop))
_ONLY: Mapping[str, _WorkloadFilter] = {
    "fairness": _WITH_ADAPTERS,
    "worst_adapter_ratio": _WITH_ADAPTERS,
    "asked_rate": _OPEN,
    "late_p99_ms": _OPEN,
}
"""Metrics that only some workloads have."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """``[WORKLOAD/]METRIC<LIMIT``: a workload for which this holds has failed."""

    text: str
    work: str | None
    """A workload's name, or its mix with or without the part after ``@`` or ``:``; None for all workloads."""
    metric: str
    sign: str
    limit: float

    def names(self, work: Workload) -> bool:
        """Return whether the threshold names this workload. `distinct@1` does not name `distinct@16`."""
        mix = str(work.mix)
        return self.work in (None, work.name, mix, mix.partition("@")[0], mix.partition("@")[0].partition(":")[0])

    def applies(self, work: Workload) -> bool:
        """Return whether the threshold names the workload and the workload has the metric."""
        needed = _ONLY.get(self.metric)
        return self.names(work) and (needed is None or needed.has(work))

    def missed(self, value: float) -> bool:
        """Return whether a value fails the threshold. NaN, which was not measured, fails it."""
        return math.isnan(value) or _SIGNS[self.sign](value, self.limit)


@dataclass(frozen=True, slots=True)
class ThresholdResult:
    """A threshold checked for one workload."""

    threshold: str
    work: str
    value: float
    met: bool


def parse_threshold(text: str) -> Threshold:
    """Parse ``"ttft_p95_ms>500"`` or ``"zipf/output_tokens_per_s<300"``. Raises :class:`BadOption`."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise BadOption(f"{text!r} is not [WORKLOAD/]METRIC>LIMIT (also <, >=, <=)")
    metric = match["metric"]
    if metric not in METRICS:
        near = get_close_matches(metric, METRICS, n=3) or list(METRICS)
        raise BadOption(f"{text!r}: there is no metric {metric!r}; similar ones are {', '.join(near)}")
    try:
        limit = float(match["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise BadOption(f"{text!r}: {match['limit']!r} is not a number")
    return Threshold(text.strip(), match["work"], metric, match["sign"], limit)


def check_applied(thresholds: Sequence[Threshold], workloads: Sequence[Workload]) -> None:
    """Raise :class:`BadOption` for a threshold that applies to no workload."""
    for threshold in thresholds:
        named = [work for work in workloads if threshold.names(work)]
        if not named:
            there = ", ".join(work.name for work in workloads)
            raise BadOption(f"{threshold.text!r}: no workload is called {threshold.work!r}; the workloads are {there}")
        if not any(map(threshold.applies, named)):
            which = _ONLY[threshold.metric].description
            raise BadOption(f"{threshold.text!r}: only {which} have that metric, and none of them is run")


def check_thresholds(
    thresholds: Sequence[Threshold], rows: Sequence[tuple[Workload, WorkloadMetrics]]
) -> list[ThresholdResult]:
    """Check every threshold for every workload that it applies to."""
    results = []
    for threshold in thresholds:
        for work, row in rows:
            if threshold.applies(work):
                value = row.values[threshold.metric]
                results.append(ThresholdResult(threshold.text, work.name, value, not threshold.missed(value)))
    return results
