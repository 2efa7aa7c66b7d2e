"""GrammarSpec: what an answer must look like, as a request says it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark"]

WHITESPACE: Mapping[str, str] = MappingProxyType({"whitespace_pattern": r"\x20|\n[\x20\t]{0,32}"})
"""llguidance's options for JSON: in each place nothing, one space, or one line break with an indentation.

That covers compact and indented JSON. JSON itself allows any amount, and small models then often write line breaks
until ``max_tokens``.
"""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar in text. Equal specs are compiled once."""

    kind: Kind
    source: str = ""
    """``json_object``: empty. ``json_schema``: the schema as JSON. ``regex``: what the whole answer matches.
    ``choice``: a JSON list of strings, one of which is the answer. ``lark``: a grammar in llguidance's variant of
    Lark's syntax, or in GBNF; JSON schemas inside it (``%json``) take :func:`with_whitespace`."""


def with_whitespace(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema with :data:`WHITESPACE`, as ``%json`` in a Lark grammar needs it."""
    return {**schema, "x-guidance": dict(WHITESPACE)}
