"""Tools and tool calls, as chat templates want them, however they were stored.

Two things go wrong otherwise, each without an error. OpenAI writes a call's ``arguments`` as JSON text, which a
template that says ``arguments | tojson`` encodes a second time; transformers' convention is an object, but some
templates join it to a text. And Arrow, and so Parquet and whatever came out of it, gives every object the keys of all
others, as nulls.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.data.conversation import DataError

_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords of JSON Schema whose keys are names, and whose values are schemas."""
_OF_DATA = frozenset({"default", "const", "enum", "examples", "example"})
"""Keywords whose value is data, so that a null in it says something."""

MAX_DEPTH = 100
"""Objects and lists within each other, in tools and in a call's arguments. What is written here and in templates calls
itself for each of them, and Python ends that at a thousand calls."""

Message = dict[str, Any]
"""A turn as a chat template gets it."""


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """``tools`` of a row: a list of objects, or the same as JSON text, as some data sets have it. Raises DataError."""
    tools = _objects(value, "tools")
    return [_schema(tool) for tool in tools] or None


def read_calls(value: Any, field: str, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``tool_calls`` of a turn, checked, without the nulls that say nothing. ``arguments`` stays text or object.

    Raises DataError where ``arguments`` is no JSON object.
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


def shapes(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The same messages in all the ways that templates may want them, the most usual first.

    Arguments as objects or as text; a turn that only calls without content, which is what transformers makes of
    OpenAI's null, or with an empty one.
    """
    if not any("tool_calls" in message for message in messages):
        yield list(messages)
        return
    for as_text in (False, True):
        shaped = [_shaped(message, as_text=as_text) for message in messages]
        yield shaped
        if any(message["content"] is None for message in shaped):
            yield [{**message, "content": message["content"] or ""} for message in shaped]


def in_python(messages: Sequence[Message], text: str) -> bool:
    """Whether a template took arguments for text that were none, and so wrote ``{'a': None}`` instead of JSON.

    Where it wrote the whole call so, that is its way.
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
        # Parquet has dates and bytes, for which transformers would put in a word of its own.
        raise DataError(f"`{field}` is no JSON: {error}") from None
    _check_depth(objects, field)
    return objects


def _check_depth(value: Any, field: str) -> None:
    """Raises DataError for values within values that templates, and what is below, could not follow to the end."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise DataError(f"`{field}` is nested more than {MAX_DEPTH} deep")
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]


def _schema(value: Any) -> Any:
    """A JSON schema, or a tool with one in it, without keywords and definitions that are null."""
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    cleaned = {}
    for key, item in value.items():
        if key in _OF_DATA:
            cleaned[key] = item
        elif key in _OF_SCHEMAS and isinstance(item, dict):
            cleaned[key] = {name: _schema(schema) for name, schema in item.items() if schema is not None}
        elif item is not None:
            cleaned[key] = _schema(item)
    return cleaned


def _with_arguments(function: dict[str, Any], field: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A called function with its arguments, which may be left out where there are none."""
    arguments = function.get("arguments")
    if arguments in (None, "") or arguments == []:  # in PHP an object without keys is an empty list
        return function | {"arguments": {}}
    if isinstance(arguments, dict):
        return function | {"arguments": _given(arguments, _parameters(function.get("name"), tools))}
    written = _loaded(arguments, field)
    if not isinstance(written, dict):
        raise DataError(f"`{field}` must be an object, or one as JSON text")
    _check_depth(written, field)
    return function


def _loaded(arguments: Any, field: str) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{field}` is no valid JSON: {error}") from None


def _parameters(name: Any, tools: Sequence[Mapping[str, Any]]) -> Any:
    """The schema of a function's arguments, where one of the tools declares it."""
    functions = (_function(tool) for tool in tools)
    return next((function.get("parameters") for function in functions if function.get("name") == name), None)


def _given(value: Any, schema: Any) -> Any:
    """Arguments without the nulls that their schema does not allow: these are other calls' keys."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_given(item, schema.get("items")) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties")
    known = known if isinstance(known, dict) else {}
    return {
        key: _given(item, known.get(key))
        for key, item in value.items()
        if item is not None or _may_be_null(known.get(key))
    }


def _may_be_null(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    kinds, enum = schema.get("type"), schema.get("enum")
    unions = [option for name in ("anyOf", "oneOf") for option in _list(schema.get(name))]
    return (
        "null" in [kinds, *_list(kinds)]
        or schema.get("nullable") is True
        or None in _list(enum)
        or any(map(_may_be_null, unions))
    )


def _list(value: Any) -> list[Any]:
    """What a keyword of a schema lists; nothing where it is no list, whatever it is instead."""
    return value if isinstance(value, list) else []


def _shaped(message: Message, *, as_text: bool) -> Message:
    """A message whose calls all have arguments as text, or all as objects."""
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
    """What is called: OpenAI has it in ``function``, others beside."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
