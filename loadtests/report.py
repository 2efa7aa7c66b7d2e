"""Timings -> figures -> tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from loadtests.client import Timing

HEADER = (
    "work", "concurrent", "output tok/s", "spread", "first token p50 ms", "p95", "between tokens p50 ms", "p95",
    "prompt tokens", "failed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Round:
    """What one run of one case gave."""

    seconds: float
    timings: tuple[Timing, ...]
    failures: tuple[str, ...] = ()
    """The reason of each failed request."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A case at one concurrency: the median over its rounds of each round's figure. Times in milliseconds.

    NaN where every request failed.
    """

    work: str
    concurrent: int
    tokens_per_second: float
    spread: float
    """(most - least) / median of the rounds' tokens per second."""
    first_p50: float
    first_p95: float
    gap_p50: float
    gap_p95: float
    prompt_tokens: float
    """Mean per request."""
    cached_tokens: int
    """Prompt tokens that came from a prompt cache, over all rounds."""
    requests: int
    failures: tuple[str, ...]

    def row(self) -> list[str]:
        """Its line of the table."""
        return [
            self.work,
            str(self.concurrent),
            f"{self.tokens_per_second:.0f}",
            f"{self.spread:.0%}",
            f"{self.first_p50:.0f}",
            f"{self.first_p95:.0f}",
            f"{self.gap_p50:.1f}",
            f"{self.gap_p95:.1f}",
            f"{self.prompt_tokens:.0f}",
            f"{len(self.failures)} of {self.requests}",
        ]


def figures(work: str, concurrent: int, rounds: Sequence[Round]) -> Figures:
    """The figures of a case's rounds."""
    rates = [rate(run) for run in rounds]
    middle = median(rates)
    timings = [timing for run in rounds for timing in run.timings]
    failures = tuple(reason for run in rounds for reason in run.failures)
    return Figures(
        work=work,
        concurrent=concurrent,
        tokens_per_second=middle,
        spread=(max(rates) - min(rates)) / middle if middle else float("nan"),
        first_p50=median(first_ms(run, 50) for run in rounds),
        first_p95=median(first_ms(run, 95) for run in rounds),
        gap_p50=median(gap_ms(run, 50) for run in rounds),
        gap_p95=median(gap_ms(run, 95) for run in rounds),
        prompt_tokens=fmean(timing.prompt_tokens for timing in timings) if timings else float("nan"),
        cached_tokens=sum(timing.cached_tokens for timing in timings),
        requests=len(timings) + len(failures),
        failures=failures,
    )


def rate(run: Round) -> float:
    """Output tokens per second, over the whole round."""
    return sum(timing.output_tokens for timing in run.timings) / run.seconds


def first_ms(run: Round, percent: float) -> float:
    """A percentile of the time to the first text, in milliseconds."""
    return _percentile_ms([timing.first for timing in run.timings], percent)


def gap_ms(run: Round, percent: float) -> float:
    """A percentile of the time between two texts, in milliseconds."""
    return _percentile_ms([gap for timing in run.timings for gap in timing.gaps], percent)


def _percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1000 if seconds else float("nan")


def aligned(rows: Sequence[Figures]) -> str:
    """A table for a terminal."""
    lines = [list(HEADER), *(row.row() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            _justify(cell, width, left=column == 0)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(rows: Sequence[Figures]) -> str:
    """The same table for a page."""
    lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *(row.row() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _justify(cell: str, width: int, *, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
