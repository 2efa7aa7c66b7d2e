"""How many tokens a prompt or an answer has."""

import math
import random
from dataclasses import dataclass

from loadtests.bounds import MOST_SIGMA, MOST_TOKENS, within
from loadtests.errors import BadOption

LONG_TAIL = 8
"""The longest of a lognormal, in medians, unless it is told."""
FORMS = "TOKENS, or lognormal:MEDIAN:SIGMA[:LEAST:MOST]"


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    tokens: int

    @property
    def median(self) -> float:
        return self.tokens

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
                most = min(math.ceil(LONG_TAIL * float(median)), MOST_TOKENS)
                lengths: Lengths = Lognormal(float(median), float(sigma), 1, most)
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
            within(f"{text!r}: a length", tokens, 1, MOST_TOKENS)
        case Lognormal(median, sigma, least, most):
            within(f"{text!r}: a length's sigma", sigma, 0.0, MOST_SIGMA)
            within(f"{text!r}: the greatest length", most, 1, MOST_TOKENS)
            within(f"{text!r}: the least length", least, 1, most)
            within(f"{text!r}: a length's median", median, least, most)
