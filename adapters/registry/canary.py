"""Canary: which target an alias means for one request."""

import random
from hashlib import sha256

from adapters.registry.snapshot import Alias, Target


def choose(alias: Alias, user: str | None) -> Target:
    """One of the targets by weight: always the same for one ``user``, any for None.

    A user's place among the weights depends on the alias and the user alone. So when the second of two weights grows,
    users move from the first to the second only, and never the other way.
    """
    weighted = [target for target in alias.targets if target.weight]
    left = _place(alias.name, user) * sum(target.weight for target in weighted)
    for target in weighted:
        left -= target.weight
        if left < 0:
            return target
    return weighted[-1]  # rounding


def _place(alias: str, user: str | None) -> float:
    """0 to 1, without 1."""
    if user is None:
        return random.random()
    digest = sha256(f"{alias}\0{user}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)
