"""Which adapter each request asks for."""

import math
import random
from dataclasses import dataclass
from itertools import cycle, islice

from loadtests.bounds import MOST_ADAPTERS, within
from loadtests.errors import BadOption

HOT_SHARE = 0.9
FORMS = (
    "base, single, identical, distinct, uniform, zipf[:ALPHA], hot[:SHARE[:ADAPTERS]] or trace, each but base, single "
    "and trace with @COUNT after it where --count is not meant"
)


@dataclass(frozen=True, slots=True)
class InTurn:
    """Adapter 0, 1, ... ``count`` - 1, 0, ...: as many clients share none while requests are of one length.

    None is the base alone.
    """

    name: str
    count: int

    def __str__(self) -> str:
        return f"{self.name}@{self.count}" if self.name == "distinct" else self.name

    @property
    def wanted(self) -> list[int | None]:
        """The adapters that may be asked for, by number, the most wanted first."""
        return [*range(self.count)] or [None]

    def draw(self, rng: random.Random, requests: int) -> list[int | None]:
        """The adapter's number for each request; None for the base."""
        return list(islice(cycle(self.wanted), requests))


@dataclass(frozen=True, slots=True)
class Weighted:
    """Each request by itself, adapter ``k`` in proportion to ``weights[k]``."""

    name: str
    weights: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.name}@{self.count}"

    @property
    def count(self) -> int:
        return len(self.weights)

    @property
    def wanted(self) -> list[int | None]:
        """The adapters that may be asked for, by number, the most wanted first."""
        return [number for number, weight in enumerate(self.weights) if weight]

    def draw(self, rng: random.Random, requests: int) -> list[int | None]:
        """The adapter's number for each request."""
        return [*rng.choices(range(self.count), self.weights, k=requests)]


@dataclass(frozen=True, slots=True)
class Traced:
    """As a trace says."""

    def __str__(self) -> str:
        return "trace"


Mix = InTurn | Weighted | Traced


def parse_mix(text: str, count: int) -> Mix:
    """``"base"``, ``"distinct"``, ``"zipf:1.0@64"``, ... over ``count`` adapters where it does not say.

    Raises :class:`BadOption`.
    """
    spec, at, number = text.partition("@")
    try:
        mix = _mix(spec.split(":"), within(f"{text!r}: adapters", int(number), 1, MOST_ADAPTERS) if at else count)
    except ValueError:
        mix = None
    if mix is None or (at and not isinstance(mix, Weighted) and spec != "distinct"):
        raise BadOption(f"{text!r} is no mix of adapters: {FORMS}")
    return mix


def _mix(words: list[str], count: int) -> Mix | None:
    match words:
        case ["base"]:
            return InTurn("base", 0)
        case ["single"]:
            return InTurn("single", 1)
        case ["distinct"]:
            return InTurn("distinct", count)
        case ["trace"]:
            return Traced()
        case ["identical"]:
            return Weighted("identical", (1.0,) + (0.0,) * (count - 1))
        case ["uniform"]:
            return Weighted("uniform", (1.0,) * count)
        case ["zipf"]:
            return _zipf(1.0, count)
        case ["zipf", alpha]:
            return _zipf(float(alpha), count)
        case ["hot"]:
            return _hot(HOT_SHARE, 1, count)
        case ["hot", share]:
            return _hot(float(share), 1, count)
        case ["hot", share, hot]:
            return _hot(float(share), int(hot), count)
    return None


def _zipf(alpha: float, count: int) -> Weighted:
    """Adapter ``k`` in proportion to ``1 / (k + 1) ** alpha``."""
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError
    return Weighted(f"zipf:{alpha:g}", tuple((k + 1) ** -alpha for k in range(count)))


def _hot(share: float, hot: int, count: int) -> Weighted:
    """The first ``hot`` adapters together get ``share`` of the requests, the cold ones the rest."""
    if not (0 < share < 1 and 0 < hot < count):
        raise ValueError
    cold = (1 - share) / (count - hot)
    return Weighted(f"hot:{share:g}:{hot}", (share / hot,) * hot + (cold,) * (count - hot))
