"""Mixes: which adapter each request names."""

import math
import random
from dataclasses import dataclass
from itertools import cycle, islice

from loadtests.errors import BadOption
from loadtests.limits import MAX_ADAPTERS, check_range

HOT_SHARE = 0.9
FORMS = (
    "base, single, identical, distinct, uniform, zipf[:ALPHA], hot[:SHARE[:ADAPTERS]] or trace; append @COUNT for "
    "another number of adapters than --count, except to base, single and trace"
)


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Adapters 0, 1, ... ``count`` - 1, 0, ...; with ``count`` 0 the base.

    As many clients as adapters use a different one each, as long as their requests take equally long.
    """

    name: str
    count: int

    def __str__(self) -> str:
        return f"{self.name}@{self.count}" if self.name == "distinct" else self.name

    @property
    def by_popularity(self) -> list[int | None]:
        """The numbers of the adapters that requests may name, the most popular first; None is the base."""
        return [*range(self.count)] or [None]

    def draw(self, rng: random.Random, requests: int) -> list[int | None]:
        """Return the adapter's number for each request; None for the base."""
        return list(islice(cycle(self.by_popularity), requests))


@dataclass(frozen=True, slots=True)
class WeightedRandom:
    """An adapter drawn for each request, adapter ``k`` with a probability proportional to ``weights[k]``."""

    name: str
    weights: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.name}@{self.count}"

    @property
    def count(self) -> int:
        return len(self.weights)

    @property
    def by_popularity(self) -> list[int | None]:
        """The numbers of the adapters that requests may name, the most popular first; None is the base."""
        return [number for number, weight in enumerate(self.weights) if weight]

    def draw(self, rng: random.Random, requests: int) -> list[int | None]:
        """Return the adapter's number for each request."""
        return [*rng.choices(range(self.count), self.weights, k=requests)]


@dataclass(frozen=True, slots=True)
class TraceMix:
    """The adapters of a trace."""

    def __str__(self) -> str:
        return "trace"


Mix = RoundRobin | WeightedRandom | TraceMix


def parse_mix(text: str, count: int) -> Mix:
    """Parse ``"base"``, ``"distinct"``, ``"zipf:1.0@64"``, ... ``count`` is the number of adapters without ``@``.

    Raises :class:`BadOption`.
    """
    spec, at, number = text.partition("@")
    try:
        mix = _mix(spec.split(":"), check_range(f"{text!r}: adapters", int(number), 1, MAX_ADAPTERS) if at else count)
    except ValueError:
        mix = None
    if mix is None or (at and not isinstance(mix, WeightedRandom) and spec != "distinct"):
        raise BadOption(f"{text!r} is not a mix of adapters: give {FORMS}")
    return mix


def _mix(words: list[str], count: int) -> Mix | None:
    match words:
        case ["base"]:
            return RoundRobin("base", 0)
        case ["single"]:
            return RoundRobin("single", 1)
        case ["distinct"]:
            return RoundRobin("distinct", count)
        case ["trace"]:
            return TraceMix()
        case ["identical"]:
            return WeightedRandom("identical", (1.0,) + (0.0,) * (count - 1))
        case ["uniform"]:
            return WeightedRandom("uniform", (1.0,) * count)
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


def _zipf(alpha: float, count: int) -> WeightedRandom:
    """Return the mix with adapter ``k`` proportional to ``1 / (k + 1) ** alpha``."""
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError
    return WeightedRandom(f"zipf:{alpha:g}", tuple((k + 1) ** -alpha for k in range(count)))


def _hot(share: float, hot: int, count: int) -> WeightedRandom:
    """Return the mix whose first ``hot`` adapters together get ``share`` of the requests, the others the rest."""
    if not (0 < share < 1 and 0 < hot < count):
        raise ValueError
    cold = (1 - share) / (count - hot)
    return WeightedRandom(f"hot:{share:g}:{hot}", (share / hot,) * hot + (cold,) * (count - hot))
