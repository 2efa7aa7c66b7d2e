"""Speaker: who answers, as a user names it: the base, an adapter, a version, an alias, an address or a mix."""

import math
from dataclasses import dataclass

from adapters.cli.client import JsonObject
from adapters.registry.names import check_name, parse_reference
from adapters.sources.address import is_address
from bases.errors import ManyloraError

BASE = "base"
"""The word for the base alone, unless the server has an adapter of that name."""
FORM = "NAME, NAME@VERSION, an alias, base, or a mix as legal=0.7+german=0.3"


class BadInput(ManyloraError):
    """What was typed cannot be used, with the reason."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Speaker:
    """Who answers. ``parts`` are names and weights; none for the base alone."""

    label: str
    parts: tuple[tuple[str, float], ...] = ()

    def fields(self) -> JsonObject:
        """Return the field of a request that asks for this speaker."""
        match self.parts:
            case ((name, 1.0),):
                return {"adapter": name}
            case parts:
                return {"adapter": [{"name": name, "weight": weight} for name, weight in parts]}

    def names(self) -> list[str]:
        """Return the names that the server must know. It may fetch an address when a request names it."""
        return [name for name, _ in self.parts if not is_address(name)]


def parse_speaker(text: str) -> Speaker:
    """Parse what a user typed. Raises BadInput, or an AdapterError for an invalid name.

    The base's own word is taken for a name here: only the server knows whether it has such an adapter.
    """
    if is_address(text):
        return Speaker(text, ((text, 1.0),))
    parts = tuple(_part(word, text) for word in text.split("+"))
    for name, _ in parts:
        check_name(parse_reference(name).name)
    return Speaker(text, parts)


def _part(word: str, text: str) -> tuple[str, float]:
    name, equals, weight = word.partition("=")
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise BadInput(f"{text!r} is not {FORM}")
    return name, value
