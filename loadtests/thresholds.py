"""What a run must reach: ``ttft_p95_ms<=500`` or, turned round, what makes it fail: ``ttft_p95_ms>500``."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from loadtests.errors import BadOption
from loadtests.figures import MEASURES, Figures

_FORM = re.compile(r"\s*(?:(?P<work>\S.*?)\s*/\s*)?(?P<figure>\w+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)\s*")
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Threshold:
    """``[WORKLOAD/]FIGURE<LIMIT``: a workload for which that holds has failed."""

    text: str
    work: str | None
    """A workload's name or its beginning; None means all of them."""
    figure: str
    sign: str
    limit: float

    def meant(self, work: str) -> bool:
        return self.work is None or work.startswith(self.work)

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
    if math.isnan(limit):
        raise BadOption(f"{text!r}: {match['limit']!r} is no number")
    return Threshold(text.strip(), match["work"], figure, match["sign"], limit)


def check_names(thresholds: Sequence[Threshold], works: Sequence[str]) -> None:
    """Raises :class:`BadOption` for a threshold of a workload that is not run."""
    for threshold in thresholds:
        if not any(map(threshold.meant, works)):
            raise BadOption(
                f"{threshold.text!r}: no workload is called {threshold.work!r}; there is {', '.join(works)}"
            )


def judge(thresholds: Sequence[Threshold], rows: Sequence[Figures]) -> list[Verdict]:
    """Every threshold on every workload it is meant for."""
    verdicts = []
    for threshold in thresholds:
        for row in rows:
            if threshold.meant(row.work):
                value = row.values[threshold.figure]
                verdicts.append(Verdict(threshold.text, row.work, value, not threshold.missed(value)))
    return verdicts
