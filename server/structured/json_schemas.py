"""Which JSON schemas are supported.

llguidance refuses the keywords of JSON Schema that it does not implement, and ignores all others. Here the others are
refused, too, but for annotations: a misspelt keyword would otherwise constrain nothing.
"""

from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64
"""Schemas inside each other. llguidance's JSON parser ends at 128 levels of JSON."""
MAX_PROPERTIES = 2000
"""In all objects of a schema together."""
MAX_OPTIONAL = 400
"""Optional properties of one object. llguidance's time grows with their square, and it follows no object of 500."""

SUPPORTED = frozenset(
    {
        "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "patternProperties",
        "additionalProperties", "required", "minProperties", "maxProperties", "items", "additionalItems",
        "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
        "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems",
    }
)  # fmt: skip
ANNOTATIONS = frozenset(
    {
        "$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "title", "description", "default",
        "examples", "example", "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType",
        "discriminator", "externalDocs", "xml",
    }
)  # fmt: skip
"""Keywords that do not change what is valid; ``x-...`` is one, too."""

_SCHEMA = ("additionalProperties", "additionalItems", "items")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def check(schema: object) -> str | None:
    """Why ``schema``, which is parsed JSON, is not supported, or None. Drops ``uniqueItems: false`` from it."""
    if not isinstance(schema, dict):
        return "a schema must be an object"
    left: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), schema)]
    properties = 0
    while left:
        path, part = left.pop()
        at = f" at `{'.'.join(path)}`"[:200] if path else ""
        if len(path) > 2 * MAX_DEPTH:
            return f"it is nested more than {MAX_DEPTH} levels deep"
        if part.get("uniqueItems") is False:
            del part["uniqueItems"]
        for keyword in part:
            if keyword not in SUPPORTED and keyword not in ANNOTATIONS and not keyword.startswith("x-"):
                return f"the keyword `{keyword[:80]}`{at} is not supported"
        if part.get("uniqueItems"):
            return f"the keyword `uniqueItems`{at} is not supported"
        named = part.get("properties")
        properties += len(named) if isinstance(named, dict) else 0
        if properties > MAX_PROPERTIES:
            return f"it has more than {MAX_PROPERTIES} properties"
        if _optional(part) > MAX_OPTIONAL:
            return f"an object{at} has more than {MAX_OPTIONAL} properties that are not required"
        left += ((path + step, inner) for step, inner in _inner(part))
    return None


def _optional(schema: dict[str, Any]) -> int:
    """The number of properties that an object may lack. Those of a schema that is malformed are found by llguidance."""
    named, required = schema.get("properties"), schema.get("required")
    if not isinstance(named, dict):
        return 0
    names = required if isinstance(required, list) else []
    return len(named.keys() - {name for name in names if isinstance(name, str)})


def _inner(schema: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The schemas directly inside one, each with the keys that lead to it."""
    for keyword in _SCHEMA:
        if isinstance(inner := schema.get(keyword), dict):
            yield (keyword,), inner
    for keyword in _SCHEMAS:
        several = schema.get(keyword)
        for index, inner in enumerate(several if isinstance(several, list) else ()):
            if isinstance(inner, dict):
                yield (keyword, str(index)), inner
    for keyword in _NAMED:
        named = schema.get(keyword)
        for name, inner in named.items() if isinstance(named, dict) else ():
            if isinstance(inner, dict):
                yield (keyword, name), inner
