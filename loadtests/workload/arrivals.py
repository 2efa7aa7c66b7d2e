"""Arrivals: when requests are sent.

In a closed loop each of N clients sends its next request when its last one has ended, so a slow server gets fewer
requests. In an open loop requests are sent at a rate, whatever the server does: with the gaps of a Poisson process,
with equal gaps, or with gaps of a Gamma distribution, whose coefficient of variation is 1/sqrt(shape). Shape 1 is the
Poisson process; vLLM's ``--burstiness`` is this shape.
"""

import random
from dataclasses import dataclass
from itertools import accumulate

from loadtests.errors import BadOption
from loadtests.limits import MAX_CLIENTS, RATE_RANGE, SHAPE_RANGE, check_range

FORMS = "closed:CLIENTS, poisson:RATE, constant:RATE, gamma:RATE:SHAPE or trace"


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A closed loop of ``clients``."""

    clients: int

    def __str__(self) -> str:
        return f"closed:{self.clients}"


@dataclass(frozen=True, slots=True)
class ConstantRate:
    """An open loop with a request every 1 / ``rate`` seconds."""

    rate: float

    def __str__(self) -> str:
        return f"constant:{self.rate:g}"

    def offsets(self, rng: random.Random, count: int) -> list[float]:
        """Return when each of ``count`` requests is sent, in seconds after the first."""
        return [index / self.rate for index in range(count)]


@dataclass(frozen=True, slots=True)
class GammaArrivals:
    """An open loop with gaps ~ Gamma(``shape``), scaled so that the mean gap of a round is exactly 1 / ``rate``.

    Unscaled, the rate of a round would deviate by about 1 / sqrt(``shape`` * requests): 10% for 100 requests of a
    Poisson process. vLLM's ``bench serve`` scales in the same way.
    """

    rate: float
    shape: float

    def __str__(self) -> str:
        return f"poisson:{self.rate:g}" if self.shape == 1 else f"gamma:{self.rate:g}:{self.shape:g}"

    def offsets(self, rng: random.Random, count: int) -> list[float]:
        """Return when each of ``count`` requests is sent, in seconds after the first."""
        offsets = list(accumulate((rng.gammavariate(self.shape, 1.0) for _ in range(count - 1)), initial=0.0))
        scale = (count - 1) / self.rate / (offsets[-1] or 1.0)
        return [offset * scale for offset in offsets]


@dataclass(frozen=True, slots=True)
class TraceArrivals:
    """The times of a trace."""

    def __str__(self) -> str:
        return "trace"


Arrivals = ClosedLoop | ConstantRate | GammaArrivals | TraceArrivals


def parse_arrivals(text: str) -> Arrivals:
    """Parse ``"closed:16"``, ``"poisson:2.5"``, ``"gamma:2.5:0.25"``, ... Raises :class:`BadOption`."""
    try:
        match text.split(":"):
            case ["closed", clients]:
                return ClosedLoop(check_range(f"{text!r}: clients", int(clients), 1, MAX_CLIENTS))
            case ["constant", rate]:
                return ConstantRate(_rate(text, rate))
            case ["poisson", rate]:
                return GammaArrivals(_rate(text, rate), 1.0)
            case ["gamma", rate, shape]:
                return GammaArrivals(_rate(text, rate), check_range(f"{text!r}: the shape", float(shape), *SHAPE_RANGE))
            case ["trace"]:
                return TraceArrivals()
    except ValueError:
        pass
    raise BadOption(f"{text!r} is not a kind of arrivals: give {FORMS}")


def _rate(text: str, rate: str) -> float:
    return check_range(f"{text!r}: the rate, per second,", float(rate), *RATE_RANGE)
