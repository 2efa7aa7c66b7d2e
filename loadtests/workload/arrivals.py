"""When requests are sent.

In a closed loop each of N clients sends its next request when its last is answered, so a slow server is asked less. In
an open loop requests come when they come, answered or not: Poisson's process, one with even gaps, or a bursty one whose
gaps have a Gamma distribution of the same mean and a coefficient of variation of 1/sqrt(shape) (shape 1 is Poisson's;
vLLM's ``--burstiness`` is this shape).
"""

import random
from dataclasses import dataclass
from itertools import accumulate

from loadtests.bounds import MOST_CLIENTS, RATES, SHAPES, within
from loadtests.errors import BadOption

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
    """Gaps ~ Gamma(``shape``), all scaled alike, so that those of a round have the mean 1 / ``rate`` exactly.

    Without the scaling the rate of a short round would be off by chance: by 1 / sqrt(``shape`` * requests), which is a
    tenth for 100 requests of Poisson's. vLLM's ``bench serve`` does the same.
    """

    rate: float
    shape: float

    def __str__(self) -> str:
        return f"poisson:{self.rate:g}" if self.shape == 1 else f"gamma:{self.rate:g}:{self.shape:g}"

    def offsets(self, rng: random.Random, count: int) -> list[float]:
        """When each of ``count`` requests is sent, in seconds after the first."""
        offsets = list(accumulate((rng.gammavariate(self.shape, 1.0) for _ in range(count - 1)), initial=0.0))
        scale = (count - 1) / self.rate / (offsets[-1] or 1.0)
        return [offset * scale for offset in offsets]


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
                return Closed(within(f"{text!r}: clients", int(clients), 1, MOST_CLIENTS))
            case ["constant", rate]:
                return Constant(_rate(text, rate))
            case ["poisson", rate]:
                return Gamma(_rate(text, rate), 1.0)
            case ["gamma", rate, shape]:
                return Gamma(_rate(text, rate), within(f"{text!r}: the shape", float(shape), *SHAPES))
            case ["trace"]:
                return Traced()
    except ValueError:
        pass
    raise BadOption(f"{text!r} is no arrivals: {FORMS}")


def _rate(text: str, rate: str) -> float:
    return within(f"{text!r}: the rate, per second,", float(rate), *RATES)
