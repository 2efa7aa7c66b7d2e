"""What makes a run fail: ``ttft_p95_ms>500``, of all workloads or of those that are named."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from loadtests.errors import BadOption
from loadtests.report.figures import MEASURES, Figures
from loadtests.workload.arrivals import Closed
from loadtests.workload.workload import Workload

_FORM = re.compile(r"\s*(?:(?P<work>\S.*?)\s*/\s*)?(?P<figure>\w+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)\s*")
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """The workloads that have some figure."""

    which: str
    has: Callable[[Workload], bool]


_WITH_ADAPTERS = _Kind("workloads with adapters", lambda work: work.adapters > 0)
_OPEN = _Kind("open loops", lambda work: not isinstance(work.arrivals, Closed))
_ONLY: Mapping[str, _Kind] = {
    "fairness": _WITH_ADAPTERS,
    "worst_adapter_ratio": _WITH_ADAPTERS,
    "asked_rate": _OPEN,
    "late_p99_ms": _OPEN,
}
"""Figures that mean nothing elsewhere."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """``[WORKLOAD/]FIGURE<LIMIT``: a workload for which that holds has failed."""

    text: str
    work: str | None
    """A workload's whole name, or its mix with or without what follows ``@`` or ``:``; None means all of them."""
    figure: str
    sign: str
    limit: float

    def names(self, work: Workload) -> bool:
        """Whether this workload is meant; never by a part of a number, as `distinct@1` in `distinct@16`."""
        mix = str(work.mix)
        return self.work in (None, work.name, mix, mix.partition("@")[0], mix.partition("@")[0].partition(":")[0])

    def applies(self, work: Workload) -> bool:
        """Whether the workload is meant and has this figure at all."""
        needed = _ONLY.get(self.figure)
        return self.names(work) and (needed is None or needed.has(work))

    def missed(self, value: float) -> bool:
        """A figure that could not be measured (NaN) has not been reached."""
        return math.isnan(value) or _SIGNS[self.sign](value, self.limit)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A threshold applied to one workload."""

    threshold: str
    work: str
    value: float
    met: bool


def parse_threshold(text: str) -> Threshold:
    """``"ttft_p95_ms>500"`` or ``"zipf/output_tokens_per_s<300"``. Raises :class:`BadOption`."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise BadOption(f"{text!r} is not [WORKLOAD/]FIGURE>LIMIT (also <, >=, <=)")
    figure = match["figure"]
    if figure not in MEASURES:
        near = get_close_matches(figure, MEASURES, n=3) or list(MEASURES)
        raise BadOption(f"{text!r}: there is no figure {figure!r}; there is {', '.join(near)}")
    try:
        limit = float(match["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise BadOption(f"{text!r}: {match['limit']!r} is no number")
    return Threshold(text.strip(), match["work"], figure, match["sign"], limit)


def check_applied(thresholds: Sequence[Threshold], works: Sequence[Workload]) -> None:
    """Raises :class:`BadOption` for a threshold that none of the workloads is judged by."""
    for threshold in thresholds:
        named = [work for work in works if threshold.names(work)]
        if not named:
            there = ", ".join(work.name for work in works)
            raise BadOption(f"{threshold.text!r}: no workload is called {threshold.work!r}; there is {there}")
        if not any(map(threshold.applies, named)):
            raise BadOption(f"{threshold.text!r}: only {_ONLY[threshold.figure].which} have that figure; none is run")


def judge(thresholds: Sequence[Threshold], rows: Sequence[tuple[Workload, Figures]]) -> list[Verdict]:
    """Every threshold on every workload it applies to."""
    verdicts = []
    for threshold in thresholds:
        for work, row in rows:
            if threshold.applies(work):
                value = row.values[threshold.figure]
                verdicts.append(Verdict(threshold.text, work.name, value, not threshold.missed(value)))
    return verdicts
