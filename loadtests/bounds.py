"""How much may be asked for: beyond it a benchmark would take all memory, or years, rather than measure."""

from typing import TypeVar

from loadtests.errors import BadOption

Number = TypeVar("Number", int, float)

MOST_ADAPTERS = 100_000
MOST_RANK = 1024
MOST_CLIENTS = 10_000
"""Of a closed loop; each has a connection."""
RATES = (0.001, 10_000.0)
"""Requests per second."""
SHAPES = (0.1, 1000.0)
"""Of a Gamma distribution: its coefficient of variation is from 3.2 to 0.03."""
MOST_SECONDS = 7 * 86_400.0
"""From the first arrival of a trace to its last."""
MOST_TOKENS = 1_000_000
"""Of one prompt or answer."""
MOST_SIGMA = 10.0
MOST_REQUESTS = 100_000
"""Of a round or a trace."""
MOST_WORDS = 100_000_000
"""Of all prompts of a round."""
MOST_REPEATS = 1000
MOST_SEED = 2**63 - 1


def within(what: str, value: Number, least: Number, most: Number) -> Number:
    """``value``. Raises :class:`BadOption` where it is outside of [least, most], or is no number."""
    if not least <= value <= most:
        raise BadOption(f"{what} must be from {least:,} to {most:,} (got {value})")
    return value
