"""Rounds -> figures.

A figure of a workload is the median over its rounds of each round's figure; its spread is (most - least) / median.
Failures are counted over all rounds and the warm-up: a median would hide them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from loadtests.drive.rounds import Round
from loadtests.report.fairness import Treatment, jain, treatments

PERCENTS = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Measure:
    """What a figure is."""

    title: str
    better: int = 0
    """1 where more is better, -1 where less is, 0 where it is neither."""


def _latency(name: str, title: str) -> dict[str, Measure]:
    percentiles = {f"{name}_p{percent}_ms": Measure(f"{title}, p{percent}, ms", -1) for percent in PERCENTS}
    return {**percentiles, f"{name}_mean_ms": Measure(f"{title}, mean, ms", -1)}


MEASURES: Mapping[str, Measure] = {
    "requests_per_s": Measure("whole answers per second", 1),
    "output_tokens_per_s": Measure("output tokens per second", 1),
    "total_tokens_per_s": Measure("prompt and output tokens per second", 1),
    **_latency("ttft", "time to first text"),
    **_latency("tpot", "time per output token after the first text"),
    **_latency("gap", "time between texts"),
    **_latency("e2e", "end to end"),
    "fairness": Measure("Jain's index over the adapters' mean speeds", 1),
    "worst_adapter_ratio": Measure("speed of the slowest adapter over the mean of all", 1),
    "failed": Measure("failed requests, of all rounds and the warm-up", -1),
    "asked_rate": Measure("requests asked for per second"),
    "sent_rate": Measure("requests sent per second"),
    "late_p99_ms": Measure("sent after it was due, p99, ms", -1),
    "in_flight_mean": Measure("requests at once, mean over time"),
    "in_flight_most": Measure("requests at once, at most"),
    "prompt_tokens": Measure("prompt tokens of a request, mean"),
    "output_tokens": Measure("output tokens of a request, mean"),
    "cached_tokens": Measure("prompt tokens from the server's prompt cache"),
    "tokens_per_event": Measure("output tokens of an event with text, mean"),
    "client_cpu": Measure("processors the client kept busy", -1),
    "seconds": Measure("length of a round, s"),
}
"""Every figure there is. NaN where there is nothing to compute it from."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A workload's figures."""

    work: str
    values: Mapping[str, float]
    """Name in :data:`MEASURES` -> median over the rounds; of failures their number."""
    spread: Mapping[str, float]
    requests: int
    failures: Counter[str]
    """Reason -> how often, over all rounds and the warm-up, which is named."""
    adapters: Sequence[Treatment]
    """How each adapter fared, over all rounds."""


def figures(work: str, rounds: Sequence[Round], asked_rate: float, warm_up: Round | None = None) -> Figures:
    """The figures of a workload's rounds; of a warm-up only the failures count."""
    each = [measured(run, asked_rate) for run in rounds]
    failures = Counter(failure.reason for run in rounds for failure in run.failures)
    if warm_up:
        failures.update(f"in the warm-up: {failure.reason}" for failure in warm_up.failures)
    medians = {name: _median([values[name] for values in each]) for name in MEASURES}
    spreads = {name: _spread([values[name] for values in each]) for name in MEASURES}
    return Figures(
        work=work,
        values={**medians, "failed": float(failures.total())},
        spread={**spreads, "failed": math.nan},
        requests=sum(run.requests for run in [*rounds, *([warm_up] if warm_up else [])]),
        failures=failures,
        adapters=treatments(rounds),
    )


def measured(run: Round, asked_rate: float) -> dict[str, float]:
    """Every figure of one round."""
    timings = run.timings
    output = sum(timing.output_tokens for timing in timings)
    prompt = sum(timing.prompt_tokens for timing in timings)
    speeds = [treatment.speed for treatment in treatments([run])]
    values = {
        "requests_per_s": len(timings) / run.seconds,
        "output_tokens_per_s": output / run.seconds,
        "total_tokens_per_s": (prompt + output) / run.seconds,
        "fairness": jain(speeds),
        "worst_adapter_ratio": min(speeds) / fmean(speeds) if any(speeds) else math.nan,
        "failed": float(len(run.failures)),
        "asked_rate": asked_rate,
        "sent_rate": _sent_rate(run),
        "late_p99_ms": _percentile_ms(run.late, 99),
        "in_flight_mean": _requests_seconds(run) / run.seconds,
        "in_flight_most": float(run.in_flight),
        "prompt_tokens": prompt / len(timings) if timings else math.nan,
        "output_tokens": output / len(timings) if timings else math.nan,
        "cached_tokens": float(sum(timing.cached_tokens for timing in timings)),
        "tokens_per_event": output / sum(len(timing.arrivals) for timing in timings) if timings else math.nan,
        "client_cpu": run.cpu_seconds / run.seconds,
        "seconds": run.seconds,
    }
    for name, seconds in _latencies(run).items():
        values |= {f"{name}_p{percent}_ms": _percentile_ms(seconds, percent) for percent in PERCENTS}
        values[f"{name}_mean_ms"] = fmean(seconds) * 1000 if seconds else math.nan
    return values


def _latencies(run: Round) -> dict[str, list[float]]:
    """Seconds, of each request or, for gaps, of each pair of texts."""
    timings = run.timings
    return {
        "ttft": [timing.first for timing in timings],
        "tpot": [timing.per_token for timing in timings if timing.per_token is not None],
        "gap": [gap for timing in timings for gap in timing.gaps],
        "e2e": [timing.whole for timing in timings],
    }


def _sent_rate(run: Round) -> float:
    """Requests per second from the first that was sent to the last; NaN where all were sent at once."""
    sent = sorted([timing.started for timing in run.timings] + [failure.started for failure in run.failures])
    return (len(sent) - 1) / (sent[-1] - sent[0]) if sent and sent[-1] > sent[0] else math.nan


def _requests_seconds(run: Round) -> float:
    """The seconds all requests took, added up: over the round's length they are what was under way on average."""
    return sum(timing.whole for timing in run.timings) + sum(one.ended - one.started for one in run.failures)


def _percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1000 if seconds else math.nan


def _median(values: Sequence[float]) -> float:
    """NaN as soon as one round has none: the others are no account of all."""
    return math.nan if any(map(math.isnan, values)) else median(values)


def _spread(values: Sequence[float]) -> float:
    middle = _median(values)
    return (max(values) - min(values)) / middle if middle else math.nan
