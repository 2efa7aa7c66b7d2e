"""Converts tools and tool calls, however they are stored, to the form that chat templates expect.

Without this, two things would go wrong silently. OpenAI stores a call's ``arguments`` as JSON text, which a template
with ``arguments | tojson`` would encode twice; transformers' convention is an object, but some templates concatenate it
with text. And Arrow, and so Parquet, gives every object the keys of all others, as nulls.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.data.conversation import DataError

_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords of JSON Schema whose keys are names, and whose values are schemas."""
_DATA_KEYWORDS = frozenset({"default", "const", "enum", "examples", "example"})
"""Keywords whose value is data, in which a null has a meaning."""

MAX_DEPTH = 100
"""Maximum nesting depth of tools and of a call's arguments: this module and the templates recurse, and Python allows
about a thousand levels."""

Message = dict[str, Any]
"""A turn, as passed to a chat template."""


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return a row's ``tools``, given as a list of objects or as JSON text; None without any. Raises DataError."""
    tools = _objects(value, "tools")
    return [_schema(tool) for tool in tools] or None


def read_calls(value: Any, field: str, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a turn's ``tool_calls`` without meaningless nulls; ``arguments`` stays text or an object.

    Raises DataError if ``arguments`` is not a JSON object.
    """
    calls = []
    for index, call in enumerate(_objects(value, field)):
        place = f"{field}[{index}]"
        call = _without_nulls(call)
        function = call.get("function")
        if isinstance(function, dict):
            place = f"{place}.function"
            calls.append(call | {"function": _with_arguments(_without_nulls(function), f"{place}.arguments", tools)})
        else:
            calls.append(_with_arguments(call, f"{place}.arguments", tools))
    return calls


def message_forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the messages in every form that a template may expect, the most common first.

    Arguments are objects or text; the content of a turn that has only calls is None or an empty string.
    """
    if not any("tool_calls" in message for message in messages):
        yield list(messages)
        return
    for as_text in (False, True):
        converted = [_with_all_arguments(message, as_text=as_text) for message in messages]
        yield converted
        if any(message["content"] is None for message in converted):
            yield [{**message, "content": message["content"] or ""} for message in converted]


def written_in_python(messages: Sequence[Message], text: str) -> bool:
    """Return whether a template wrote arguments as a Python dict, ``{'a': None}``, instead of JSON.

    A template that writes the whole call as a Python dict does so on purpose.
    """
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = _function(call).get("arguments")
            if isinstance(arguments, dict) and arguments and str(arguments) in text:
                return str(_function(call)) not in text
    return False


def _objects(value: Any, field: str) -> list[dict[str, Any]]:
    if not value:
        return []
    objects = _loaded(value, field)
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise DataError(f"`{field}` must be a list of objects")
    try:
        json.dumps(objects, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"`{field}` has half a surrogate pair") from None
    except (TypeError, ValueError, RecursionError) as error:
        # Parquet has dates and bytes, which transformers would replace by a string.
        raise DataError(f"`{field}` is not JSON: {error}") from None
    _check_depth(objects, field)
    return objects


def _check_depth(value: Any, field: str) -> None:
    """Raise DataError for values nested too deeply for templates and this module to recurse into."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise DataError(f"`{field}` is nested more than {MAX_DEPTH} deep")
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]


def _schema(value: Any) -> Any:
    """Return a JSON schema, or a tool that contains one, without keywords and definitions that are null."""
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    cleaned = {}
    for key, item in value.items():
        if key in _DATA_KEYWORDS:
            cleaned[key] = item
        elif key in _SCHEMAS_BY_NAME and isinstance(item, dict):
            cleaned[key] = {name: _schema(schema) for name, schema in item.items() if schema is not None}
        elif item is not None:
            cleaned[key] = _schema(item)
    return cleaned


def _with_arguments(function: dict[str, Any], field: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a called function with its arguments, which are empty if missing. Raises DataError."""
    arguments = function.get("arguments")
    if arguments in (None, "") or arguments == []:  # PHP encodes an empty object as an empty list
        return function | {"arguments": {}}
    if isinstance(arguments, dict):
        return function | {"arguments": _without_disallowed_nulls(arguments, _parameters(function.get("name"), tools))}
    written = _loaded(arguments, field)
    if not isinstance(written, dict):
        raise DataError(f"`{field}` must be an object, or one as JSON text")
    _check_depth(written, field)
    return function


def _loaded(arguments: Any, field: str) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{field}` is invalid JSON: {error}") from None


def _parameters(name: Any, tools: Sequence[Mapping[str, Any]]) -> Any:
    """Return the schema of a function's arguments, if one of the tools declares it."""
    functions = (_function(tool) for tool in tools)
    return next((function.get("parameters") for function in functions if function.get("name") == name), None)


def _without_disallowed_nulls(value: Any, schema: Any) -> Any:
    """Return the arguments without nulls that their schema does not allow: Arrow adds them for keys of other calls."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_without_disallowed_nulls(item, schema.get("items")) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties")
    known = known if isinstance(known, dict) else {}
    return {
        key: _without_disallowed_nulls(item, known.get(key))
        for key, item in value.items()
        if item is not None or _may_be_null(known.get(key))
    }


def _may_be_null(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    kinds, enum = schema.get("type"), schema.get("enum")
    unions = [option for name in ("anyOf", "oneOf") for option in _as_list(schema.get(name))]
    return (
        "null" in [kinds, *_as_list(kinds)]
        or schema.get("nullable") is True
        or None in _as_list(enum)
        or any(map(_may_be_null, unions))
    )


def _as_list(value: Any) -> list[Any]:
    """Return a keyword's value if it is a list, else an empty list."""
    return value if isinstance(value, list) else []


def _with_all_arguments(message: Message, *, as_text: bool) -> Message:
    """Return the message with the arguments of all calls as text, or all as objects."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        given = _function(call).get("arguments") or {}
        arguments: Any = json.loads(given) if isinstance(given, str) else given
        if as_text:
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        function = {**_function(call), "arguments": arguments}
        calls.append({**call, "function": function} if isinstance(call.get("function"), dict) else function)
    return {**message, "tool_calls": calls}


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call's function: OpenAI nests it in ``function``, other formats do not."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
