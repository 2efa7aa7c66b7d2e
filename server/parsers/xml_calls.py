"""Tool calls that Qwen3-Coder writes: the name and each argument between tags, strings as they are.

::

    <function=weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from server.parsers.json_scanner import BrokenJson

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
MAX_NAME = 256
"""Characters of a function's or an argument's name."""
MAX_REFERENCES = 8
"""Schemas inside each other that are looked at for the type of an argument."""
Schemas = Mapping[str, Mapping[str, Any]]
"""Function -> the schema of its arguments, which says which of them are strings."""
_LITERALS = {"True": True, "False": False, "None": None}
"""What models write for JSON's literals now and then."""


class XmlCall:
    """The text of one call, while it comes. It is returned only when it is complete, for its arguments are no JSON."""

    returned: int | None = None
    ends_array = False

    def __init__(self, payload: int, schemas: Schemas) -> None:
        """``payload`` is where the text after the marker begins."""
        self.payload = payload
        self.position = payload
        """Up to where the text was read."""
        self.done = False
        self._schemas = schemas
        self._state = "before"
        """``before`` the name, in the ``name``, ``between`` arguments, in a ``key`` or a ``value``."""
        self._name = ""
        self._key = ""
        self._values: dict[str, str] = {}
        self._searched = payload
        """Up to where the end of a value was looked for."""

    def read(self, text: str, in_array: bool) -> None:
        """Read on to the end of ``text``, or of the call. Raises BrokenJson for what is no call."""
        while not self.done and self._advance(text):
            pass

    def name(self, text: str) -> str | None:
        """Return None: such a call is not returned in parts."""
        return None

    arguments = None

    def complete(self, text: str, functions: Collection[str]) -> tuple[str, str] | None:
        """Return the name and the arguments, a JSON object, of a complete call; None if it is none."""
        if self._name not in functions:
            return None
        schema = self._schemas.get(self._name, {})
        properties = schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        values = {key: _value(text, known.get(key), schema) for key, text in self._values.items()}
        return self._name, json.dumps(values, ensure_ascii=False)

    def _advance(self, text: str) -> bool:
        """Read the next part. Returns whether it has come."""
        match self._state:
            case "before":
                return self._read_tag(text, {FUNCTION: "name"})
            case "between":
                return self._read_tag(text, {PARAMETER: "key", FUNCTION_END: "done"})
            case "value":
                return self._read_value(text)
        end = text.find(">", self.position)
        if end < 0 or end - self.position > MAX_NAME:
            if len(text) - self.position > MAX_NAME:
                raise BrokenJson("no name")
            return False
        word, self.position = text[self.position : end], end + 1
        if self._state == "name":
            self._name, self._state = word, "between"
        else:
            self._key, self._state, self._searched = word, "value", self.position
        return True

    def _read_tag(self, text: str, tags: Mapping[str, str]) -> bool:
        rest = text[self.position :].lstrip()
        for tag, state in tags.items():
            if rest.startswith(tag):
                self.position = len(text) - len(rest) + len(tag)
                self._state, self.done = state, state == "done"
                return True
        if not any(tag.startswith(rest) for tag in tags):
            raise BrokenJson("no call begins here")
        return False

    def _read_value(self, text: str) -> bool:
        end = text.find(PARAMETER_END, self._searched)
        if end < 0:
            self._searched = max(self.position, len(text) - len(PARAMETER_END))
            return False
        self._values[self._key] = text[self.position : end].removeprefix("\n").removesuffix("\n")
        self.position, self._state = end + len(PARAMETER_END), "between"
        return True


def write_xml(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the text of a call."""
    lines = [f"{FUNCTION}{name}>"]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"{PARAMETER}{key}>", text, PARAMETER_END]
    return "\n".join([*lines, FUNCTION_END])


def kinds(schema: object, root: Mapping[str, Any], depth: int = MAX_REFERENCES) -> set[str]:
    """Return the types that a schema allows, as far as ``type``, ``enum``, ``const``, ``anyOf`` and ``$ref`` tell.

    ``root`` is the schema in which references are looked up. Empty if they do not tell.
    """
    if not isinstance(schema, dict) or not depth:
        return set()
    kind = schema.get("type")
    if isinstance(kind, str | list):
        return {kind} if isinstance(kind, str) else {each for each in kind if isinstance(each, str)}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {"string" if isinstance(value, str) else "null" if value is None else "other" for value in values}
    several = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(several, list):
        found = [kinds(each, root, depth - 1) for each in several]
        return set().union(*found) if all(found) else set()
    return kinds(referred(schema.get("$ref"), root), root, depth - 1)


def is_text(schema: object, root: Mapping[str, Any]) -> bool:
    """Whether an argument is written as plain text: it may be a string, or nothing says what it is."""
    allowed = kinds(schema, root)
    return not allowed or "string" in allowed


def referred(reference: object, root: Mapping[str, Any]) -> object:
    """Return the schema that a reference within ``root`` means, None if there is none."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: object = root
    for part in reference[2:].split("/"):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _value(text: str, schema: object, root: Mapping[str, Any]) -> Any:
    """Return the value that an argument's text stands for."""
    if is_text(schema, root):
        return None if text == "null" and "null" in kinds(schema, root) else text
    if text in _LITERALS:
        return _LITERALS[text]
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value
