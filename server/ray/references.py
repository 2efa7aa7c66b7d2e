"""References: the adapters that a request names, read from its path and body without checking either.

What cannot be read names nothing: any replica can answer it, and does with the error that ``manylora serve`` gives.
"""

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

ADAPTERS = "/v1/adapters/"


@dataclass(frozen=True, slots=True)
class References:
    """Names of adapters, versions or aliases, or addresses; the one with the largest weight first."""

    names: tuple[str, ...] = ()
    user: str | None = None
    """The request's ``user``, for which an alias always means the same version."""


def of_path(path: str) -> References:
    """Return what a path such as ``/v1/adapters/legal`` or ``/v1/adapters/legal/pin`` names."""
    if not path.startswith(ADAPTERS):
        return References()
    return References((unquote(path.removeprefix(ADAPTERS)).removesuffix("/pin").removesuffix("/activate"),))


def of_body(body: bytes) -> References:
    """Return what the fields ``adapter``, or else ``model``, name. ``model`` may be the base, too."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return References()
    if not isinstance(fields, dict):
        return References()
    user, adapter = fields.get("user"), fields.get("adapter")
    names = _names(fields.get("model") if adapter is None else adapter)
    return References(tuple(dict.fromkeys(names)), user if isinstance(user, str) and user else None)


def _names(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in value]
    named = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    return [entry["name"] for entry in sorted(named, key=_weight, reverse=True)]


def _weight(entry: dict[str, Any]) -> float:
    """The size of an entry's weight; an entry of weight 0 is served without its adapter, but names it."""
    weight = entry.get("weight", 1.0)
    return abs(weight) if isinstance(weight, int | float) else 0.0
