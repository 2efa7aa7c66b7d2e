"""API keys: what one allows, and which adapters it sees."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

Scope = Literal["infer", "adapters", "train", "metrics", "admin"]
"""``adapters`` manages them; ``admin`` includes all other scopes and the management of keys."""
ALL_SCOPES: frozenset[Scope] = frozenset(get_args(Scope))


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of one key, each None if there is none. Tokens are those of prompts and answers together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    tokens_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. Requests that carry it are one tenant of the scheduler."""

    id: str
    """Public, and never used again for another key. Empty for :data:`ANONYMOUS`."""
    name: str
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] | None = None
    """Names of adapters and aliases that this key sees; one that ends in ``*`` is a prefix. None: all."""
    limits: KeyLimits = field(default_factory=KeyLimits)
    weight: float = 1.0
    """Share of the server's time, against the weights of other keys that have requests."""
    expires: datetime | None = None

    def may(self, scope: Scope) -> bool:
        """Whether this key has a scope."""
        return scope in self.scopes or "admin" in self.scopes

    def sees(self, name: str) -> bool:
        """Whether this key sees the adapter or alias ``name`` (without a version)."""
        if self.adapters is None:
            return True
        return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in self.adapters)


ANONYMOUS = ApiKey("", "anonymous", ALL_SCOPES)
"""Who calls a server that has no keys: it may do everything."""
NOBODY = ApiKey("", "nobody", frozenset())
"""Who calls without a key what needs none, on a server that has keys."""
