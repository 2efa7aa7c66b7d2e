"""Canary: choose which target of an alias serves a request."""

import random
from hashlib import sha256

from adapters.registry.snapshot import Alias, Target


def choose_target(alias: Alias, user: str | None) -> Target:
    """Choose a target by weight: always the same one for one ``user``, a random one for None.

    A user's position depends only on the alias's and the user's name. So if the second of two weights is raised, users
    move from the first target to the second, and none moves back.
    """
    weighted = [target for target in alias.targets if target.weight]
    left = _position(alias.name, user) * sum(target.weight for target in weighted)
    for target in weighted:
        left -= target.weight
        if left < 0:
            return target
    return weighted[-1]  # rounding


def _position(alias: str, user: str | None) -> float:
    """Return a number in [0, 1)."""
    if user is None:
        return random.random()
    digest = sha256(f"{alias}\0{user}".encode(errors="surrogatepass")).digest()  # JSON can hold half a surrogate
    return int.from_bytes(digest[:6], "big") / (1 << 48)
