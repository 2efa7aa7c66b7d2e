"""Lengths of prompts and answers, in tokens."""

import math
import random
from dataclasses import dataclass

from loadtests.errors import BadOption
from loadtests.limits import MAX_SIGMA, MAX_TOKENS, check_range

LONG_TAIL = 8
"""The default maximum of a lognormal, as a multiple of its median."""
FORMS = "TOKENS, or lognormal:MEDIAN:SIGMA[:LEAST:MOST]"


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same length for all."""

    tokens: int

    @property
    def median(self) -> float:
        return self.tokens

    def draw(self, rng: random.Random) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp(N(ln median, sigma^2)), rounded and clipped to [least, most]."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        tokens = round(rng.lognormvariate(math.log(self.median), self.sigma))
        return min(max(tokens, self.least), self.most)


Lengths = Fixed | Lognormal


def parse_lengths(text: str) -> Lengths:
    """Parse ``"128"`` or ``"lognormal:200:0.8:16:1024"``. Raises :class:`BadOption`."""
    kind, *rest = text.split(":")
    try:
        match kind, rest:
            case "lognormal", [median, sigma]:
                most = min(math.ceil(LONG_TAIL * float(median)), MAX_TOKENS)
                lengths: Lengths = Lognormal(float(median), float(sigma), 1, most)
            case "lognormal", [median, sigma, least, most]:
                lengths = Lognormal(float(median), float(sigma), int(least), int(most))
            case tokens, []:
                lengths = Fixed(int(tokens))
            case _:
                raise BadOption(f"{text!r} is not a length: give {FORMS}")
    except (ValueError, OverflowError):
        raise BadOption(f"{text!r} is not a length: give {FORMS}") from None
    _check(lengths, text)
    return lengths


def _check(lengths: Lengths, text: str) -> None:
    match lengths:
        case Fixed(tokens):
            check_range(f"{text!r}: a length", tokens, 1, MAX_TOKENS)
        case Lognormal(median, sigma, least, most):
            check_range(f"{text!r}: the length's sigma", sigma, 0.0, MAX_SIGMA)
            check_range(f"{text!r}: the greatest length", most, 1, MAX_TOKENS)
            check_range(f"{text!r}: the least length", least, 1, most)
            check_range(f"{text!r}: the median length", median, least, most)
