"""Upper limits of options. Larger values would exhaust memory or run for years."""

from typing import TypeVar

from loadtests.errors import BadOption

Number = TypeVar("Number", int, float)

MAX_ADAPTERS = 100_000
MAX_RANK = 1024
MAX_CLIENTS = 10_000
"""Clients of a closed loop. Each has its own connection."""
RATE_RANGE = (0.001, 10_000.0)
"""Requests per second."""
SHAPE_RANGE = (0.1, 1000.0)
"""Shape of the Gamma distribution: its coefficient of variation, 1/sqrt(shape), is from 3.2 to 0.03."""
MAX_SECONDS = 7 * 86_400.0
"""From the first arrival of a trace to the last."""
MAX_TOKENS = 1_000_000
"""Tokens of one prompt or answer."""
MAX_SIGMA = 10.0
MAX_REQUESTS = 100_000
"""Requests of a round or a trace."""
MAX_WORDS = 100_000_000
"""Words of all prompts of a round."""
MAX_REPEATS = 1000
MAX_SEED = 2**63 - 1


def check_range(what: str, value: Number, least: Number, most: Number) -> Number:
    """Return ``value``. Raises :class:`BadOption` if it is NaN or outside [least, most]."""
    if not least <= value <= most:
        raise BadOption(f"{what} must be from {least:,} to {most:,} (got {value})")
    return value
