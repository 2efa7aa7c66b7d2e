"""How evenly the adapters were served.

What an adapter gets is its speed: output tokens per second of a request, from sending it to the end of its answer (the
inverse of the normalised latency), averaged over its requests; a failed request got none. Over these Jain's index is
(sum x)^2 / (n * sum x^2): 1 where all get the same, 1/n where one gets everything (R. Jain, D. Chiu, W. Hawe, "A
Quantitative Measure of Fairness and Discrimination for Resource Allocation in Shared Computer Systems", DEC-TR-301,
1984).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from loadtests.drive.rounds import Round


@dataclass(frozen=True, slots=True)
class Treatment:
    """How one adapter's requests fared; times in milliseconds, NaN where none was answered."""

    adapter: str
    requests: int
    failed: int
    speed: float
    """Output tokens per second."""
    ttft_mean_ms: float
    e2e_mean_ms: float


@dataclass(slots=True)
class _Requests:
    speeds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def treatments(rounds: Sequence[Round]) -> list[Treatment]:
    """One for each adapter that was asked for, the slowest first; requests to the base are in none."""
    requests: dict[str, _Requests] = defaultdict(_Requests)
    for run in rounds:
        for timing in run.timings:
            if timing.adapter is not None:
                served = requests[timing.adapter]
                served.speeds.append(timing.output_tokens / timing.whole)
                served.first.append(timing.first)
                served.whole.append(timing.whole)
        for failure in run.failures:
            if failure.adapter is not None:
                requests[failure.adapter].speeds.append(0.0)
    return sorted((_treatment(name, served) for name, served in requests.items()), key=lambda one: one.speed)


def jain(shares: Sequence[float]) -> float:
    """Jain's index; NaN for nobody, or where nobody got anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else math.nan


def _treatment(name: str, served: _Requests) -> Treatment:
    return Treatment(
        adapter=name,
        requests=len(served.speeds),
        failed=len(served.speeds) - len(served.whole),
        speed=fmean(served.speeds),
        ttft_mean_ms=fmean(served.first) * 1000 if served.first else math.nan,
        e2e_mean_ms=fmean(served.whole) * 1000 if served.whole else math.nan,
    )
