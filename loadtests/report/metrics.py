"""Metrics of rounds and workloads.

A workload's metric is the median over its rounds; the spread is (max - min) / median. Failures are summed over all
rounds and the warm-up instead, because a median would hide them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from loadtests.drive.rounds import Round
from loadtests.report.fairness import AdapterStats, adapter_stats, jain

PERCENTS = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown and compared."""

    title: str
    better: int = 0
    """1 if higher is better, -1 if lower is better, 0 if neither."""


def _latency(name: str, title: str) -> dict[str, Metric]:
    percentiles = {f"{name}_p{percent}_ms": Metric(f"{title}, p{percent}, ms", -1) for percent in PERCENTS}
    return {**percentiles, f"{name}_mean_ms": Metric(f"{title}, mean, ms", -1)}


METRICS: Mapping[str, Metric] = {
    "requests_per_s": Metric("complete answers per second", 1),
    "output_tokens_per_s": Metric("output tokens per second", 1),
    "total_tokens_per_s": Metric("prompt and output tokens per second", 1),
    **_latency("ttft", "time to first text"),
    **_latency("tpot", "time per output token after the first text"),
    **_latency("gap", "time between texts"),
    **_latency("e2e", "end to end"),
    "fairness": Metric("Jain's index over the adapters' mean speeds", 1),
    "worst_adapter_ratio": Metric("slowest adapter's speed over the mean of all", 1),
    "failed": Metric("failed requests in all rounds and the warm-up", -1),
    "asked_rate": Metric("requested requests per second"),
    "sent_rate": Metric("requests sent per second"),
    "late_p99_ms": Metric("delay of sending after the due time, p99, ms", -1),
    "in_flight_mean": Metric("requests in flight, mean over time"),
    "in_flight_most": Metric("requests in flight, maximum"),
    "prompt_tokens": Metric("prompt tokens per request, mean"),
    "output_tokens": Metric("output tokens per request, mean"),
    "cached_tokens": Metric("prompt tokens from the server's prefix cache"),
    "tokens_per_event": Metric("output tokens per event with text, mean"),
    "client_cpu": Metric("CPUs that the client used", -1),
    "seconds": Metric("length of a round, s"),
}
"""Name -> metric, of all metrics. A value is NaN if it could not be measured."""


@dataclass(frozen=True, slots=True)
class WorkloadMetrics:
    """The metrics of a workload."""

    work: str
    values: Mapping[str, float]
    """Name in :data:`METRICS` -> median over the rounds; for ``failed`` the sum."""
    spread: Mapping[str, float]
    requests: int
    failures: Counter[str]
    """Reason -> number of failures, over all rounds and the warm-up; reasons from the warm-up name it."""
    adapters: Sequence[AdapterStats]
    """Of each adapter over all rounds, the slowest first."""


def workload_metrics(
    work: str, rounds: Sequence[Round], asked_rate: float, warm_up: Round | None = None
) -> WorkloadMetrics:
    """Return the metrics of a workload. Of the warm-up only the failures count."""
    each = [round_metrics(run, asked_rate) for run in rounds]
    failures = Counter(failure.reason for run in rounds for failure in run.failures)
    if warm_up:
        failures.update(f"in the warm-up: {failure.reason}" for failure in warm_up.failures)
    medians = {name: _median([values[name] for values in each]) for name in METRICS}
    spreads = {name: _spread([values[name] for values in each]) for name in METRICS}
    return WorkloadMetrics(
        work=work,
        values={**medians, "failed": float(failures.total())},
        spread={**spreads, "failed": math.nan},
        requests=sum(run.requests for run in [*rounds, *([warm_up] if warm_up else [])]),
        failures=failures,
        adapters=adapter_stats(rounds),
    )


def round_metrics(run: Round, asked_rate: float) -> dict[str, float]:
    """Return all metrics of one round."""
    timings = run.timings
    output = sum(timing.output_tokens for timing in timings)
    prompt = sum(timing.prompt_tokens for timing in timings)
    speeds = [stats.speed for stats in adapter_stats([run])]
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
    """Return latencies in seconds: of each request, and for ``gap`` of each pair of consecutive texts."""
    timings = run.timings
    return {
        "ttft": [timing.ttft for timing in timings],
        "tpot": [timing.tpot for timing in timings if timing.tpot is not None],
        "gap": [gap for timing in timings for gap in timing.gaps],
        "e2e": [timing.e2e for timing in timings],
    }


def _sent_rate(run: Round) -> float:
    """Return requests per second from the first sent to the last; NaN if all were sent at once."""
    sent = sorted([timing.started for timing in run.timings] + [failure.started for failure in run.failures])
    return (len(sent) - 1) / (sent[-1] - sent[0]) if sent and sent[-1] > sent[0] else math.nan


def _requests_seconds(run: Round) -> float:
    """Return the sum of all requests' seconds. Divided by the round's length it is the mean number in flight."""
    return sum(timing.e2e for timing in run.timings) + sum(one.ended - one.started for one in run.failures)


def _percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1000 if seconds else math.nan


def _median(values: Sequence[float]) -> float:
    """Return the median; NaN if a value is NaN: the other rounds cannot represent that round."""
    return math.nan if any(map(math.isnan, values)) else median(values)


def _spread(values: Sequence[float]) -> float:
    middle = _median(values)
    return (max(values) - min(values)) / middle if middle else math.nan
