"""How many tokens a prompt or an answer has."""

import math
import random
from dataclasses import dataclass

from loadtests.errors import BadOption

LONG_TAIL = 8
"""The longest of a lognormal, in medians, unless it is told."""
FORMS = "TOKENS, or lognormal:MEDIAN:SIGMA[:LEAST:MOST]"


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    tokens: int

    def draw(self, rng: random.Random) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp(N(ln median, sigma^2)), rounded, and moved to the nearest of [least, most] where it is outside."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        tokens = round(rng.lognormvariate(math.log(self.median), self.sigma))
        return min(max(tokens, self.least), self.most)


Lengths = Fixed | Lognormal


def parse_lengths(text: str) -> Lengths:
    """``"128"`` or ``"lognormal:200:0.8:16:1024"``. Raises :class:`BadOption`."""
    kind, *rest = text.split(":")
    try:
        match kind, rest:
            case "lognormal", [median, sigma]:
                lengths: Lengths = Lognormal(float(median), float(sigma), 1, math.ceil(LONG_TAIL * float(median)))
            case "lognormal", [median, sigma, least, most]:
                lengths = Lognormal(float(median), float(sigma), int(least), int(most))
            case tokens, []:
                lengths = Fixed(int(tokens))
            case _:
                raise BadOption(f"{text!r} is no length: {FORMS}")
    except (ValueError, OverflowError):
        raise BadOption(f"{text!r} is no length: {FORMS}") from None
    _check(lengths, text)
    return lengths


def _check(lengths: Lengths, text: str) -> None:
    match lengths:
        case Fixed(tokens):
            good = tokens >= 1
        case Lognormal(median, sigma, least, most):
            good = math.isfinite(median) and math.isfinite(sigma) and sigma >= 0 and 1 <= least <= median <= most
    if not good:
        raise BadOption(f"{text!r}: a length is at least 1, sigma at least 0, and the median from LEAST to MOST")
