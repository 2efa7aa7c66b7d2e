"""The grammar of a call in Qwen3-Coder's convention, whose strings are not JSON."""

import json
from collections.abc import Mapping
from typing import Any

from server.parsers.xml_calls import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END, is_text, referred
from server.structured.json_schemas import ANNOTATIONS

_END = "\n" + PARAMETER_END + "\n"
_RAW = r"raw[lazy]: /(.|\n)*\n<\/parameter>\n/"
_ANY_ARGUMENTS = f'("{PARAMETER}" /[^>\\n]{{1,64}}/ ">\\n" raw)*'
_FREE = frozenset({"type", "anyOf", "oneOf"})
"""Keywords that plain text between tags satisfies, if it may be a string; besides annotations."""


class NotEnforceable(ValueError):
    """A schema has a keyword that cannot be enforced in this convention."""


def xml_rules(index: int, name: str, schema: Mapping[str, Any] | None) -> list[str]:
    """Return the rules of ``call_INDEX``, a call of the function ``name`` whose arguments follow ``schema``.

    Arguments come in the order of their declaration. Without a schema they are any. Raises NotEnforceable.
    """
    head, end = _text(f"{FUNCTION}{name}>\n"), _text(FUNCTION_END)
    if schema is None:
        return [f"call_{index}: {head} {_ANY_ARGUMENTS} {end}", _RAW]
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if unknown := [key for key in required if key not in properties]:
        raise NotEnforceable(f"`{unknown[0][:80]}` is required and not among the properties")
    if not properties and schema.get("additionalProperties") is not False:
        return [f"call_{index}: {head} {_ANY_ARGUMENTS} {end}", _RAW]
    rules, parts = [_RAW], []
    for number, (key, inner) in enumerate(properties.items()):
        rule = f"argument_{index}_{number}"
        parts.append(rule if key in required else f"{rule}?")
        rules += _argument(rule, key, inner if isinstance(inner, dict) else {}, schema)
    return [f"call_{index}: {head} {' '.join(parts)} {end}", *rules]


def _argument(rule: str, key: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str]:
    head = _text(f"{PARAMETER}{key}>\n")
    if isinstance(meant := referred(schema.get("$ref"), root), dict) and is_text(schema, root):
        schema = meant
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not is_text(schema, root):
        shared = {each: root[each] for each in ("$defs", "definitions") if each in root}
        return [f"{rule}: {head} {rule}_value {_text(_END)}", f"{rule}_value: %json {json.dumps({**schema, **shared})}"]
    if isinstance(values, list):
        texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
        return [f"{rule}: {head} ({' | '.join(map(_text, texts))}) {_text(_END)}"]
    if (limit := _limit(schema)) is not None:
        raise NotEnforceable(f"the keyword `{limit[:80]}` of `{key[:80]}` is not supported for text in this convention")
    return [f"{rule}: {head} raw"]


def _limit(schema: object) -> str | None:
    """Return a keyword that limits what text may be, None if all text is valid."""
    if not isinstance(schema, dict):
        return None
    limits = [key for key in schema if key not in _FREE | ANNOTATIONS and not key.startswith("x-")]
    inner = (_limit(each) for key in ("anyOf", "oneOf") for each in schema.get(key, ()))
    return limits[0] if limits else next((limit for limit in inner if limit is not None), None)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
