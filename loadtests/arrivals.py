"""When requests are sent.

In a closed loop each of N clients sends its next request when its last is answered, so a slow server is asked less. In
an open loop requests come when they come, answered or not: Poisson's process, one with even gaps, or a bursty one whose
gaps have a Gamma distribution of the same mean and a coefficient of variation of 1/sqrt(shape) (shape 1 is Poisson's;
vLLM's ``--burstiness`` is this shape).
"""

import math
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from loadtests.errors import BadOption

Number = TypeVar("Number", int, float)

FORMS = "closed:CLIENTS, poisson:RATE, constant:RATE, gamma:RATE:SHAPE or trace"


@dataclass(frozen=True, slots=True)
class Closed:
    """A closed loop."""

    clients: int

    def __str__(self) -> str:
        return f"closed:{self.clients}"


@dataclass(frozen=True, slots=True)
class Constant:
    """One request every 1/``rate`` seconds."""

    rate: float

    def __str__(self) -> str:
        return f"constant:{self.rate:g}"

    def offsets(self, rng: random.Random, count: int) -> list[float]:
        """When each of ``count`` requests is sent, in seconds after the first."""
        return [index / self.rate for index in range(count)]


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gaps ~ Gamma(``shape``, 1 / (``rate`` * ``shape``)), in seconds."""

    rate: float
    shape: float

    def __str__(self) -> str:
        return f"poisson:{self.rate:g}" if self.shape == 1 else f"gamma:{self.rate:g}:{self.shape:g}"

    def offsets(self, rng: random.Random, count: int) -> list[float]:
        """When each of ``count`` requests is sent, in seconds after the first."""
        gaps = (rng.gammavariate(self.shape, 1 / (self.rate * self.shape)) for _ in range(count - 1))
        return list(accumulate(gaps, initial=0.0))


@dataclass(frozen=True, slots=True)
class Traced:
    """As a trace says."""

    def __str__(self) -> str:
        return "trace"


Arrivals = Closed | Constant | Gamma | Traced


def parse_arrivals(text: str) -> Arrivals:
    """``"closed:16"``, ``"poisson:2.5"``, ``"gamma:2.5:0.25"``, ... Raises :class:`BadOption`."""
    try:
        match text.split(":"):
            case ["closed", clients]:
                return Closed(_positive(int(clients)))
            case ["constant", rate]:
                return Constant(_positive(float(rate)))
            case ["poisson", rate]:
                return Gamma(_positive(float(rate)), 1.0)
            case ["gamma", rate, shape]:
                return Gamma(_positive(float(rate)), _positive(float(shape)))
            case ["trace"]:
                return Traced()
    except ValueError:
        pass
    raise BadOption(f"{text!r} is no arrivals: {FORMS}, with numbers above 0")


def _positive(value: Number) -> Number:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError
    return value
