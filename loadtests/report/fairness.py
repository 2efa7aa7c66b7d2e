"""Fairness: how evenly the adapters were served.

The speed of a request is its output tokens per second from sending it to the end of its answer (the inverse of the
normalised latency), 0 if it failed; the speed of an adapter is the mean over its requests. Jain's index of the speeds x
is (sum x)^2 / (n * sum x^2): 1 if all are equal, 1/n if one adapter gets everything (R. Jain, D. Chiu, W. Hawe, "A
Quantitative Metric of Fairness and Discrimination for Resource Allocation in Shared Computer Systems", DEC-TR-301,
1984).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from loadtests.drive.rounds import Round


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """Statistics of one adapter's requests. Times are in milliseconds, NaN if no request was answered."""

    adapter: str
    requests: int
    failed: int
    speed: float
    """Output tokens per second of a request, mean."""
    ttft_mean_ms: float
    e2e_mean_ms: float


@dataclass(slots=True)
class _Requests:
    """Speeds and latencies (s) of one adapter's requests so far."""

    speeds: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)


def adapter_stats(rounds: Sequence[Round]) -> list[AdapterStats]:
    """Return the statistics of each adapter that requests named, the slowest first. Leaves out requests to the base."""
    requests: dict[str, _Requests] = defaultdict(_Requests)
    for run in rounds:
        for timing in run.timings:
            if timing.adapter is not None:
                served = requests[timing.adapter]
                served.speeds.append(timing.output_tokens / timing.e2e)
                served.ttft.append(timing.ttft)
                served.e2e.append(timing.e2e)
        for failure in run.failures:
            if failure.adapter is not None:
                requests[failure.adapter].speeds.append(0.0)
    return sorted((_stats(name, served) for name, served in requests.items()), key=lambda one: one.speed)


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index; NaN without shares, or if all are 0."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else math.nan


def _stats(name: str, served: _Requests) -> AdapterStats:
    return AdapterStats(
        adapter=name,
        requests=len(served.speeds),
        failed=len(served.speeds) - len(served.e2e),
        speed=fmean(served.speeds),
        ttft_mean_ms=fmean(served.ttft) * 1000 if served.ttft else math.nan,
        e2e_mean_ms=fmean(served.e2e) * 1000 if served.e2e else math.nan,
    )
