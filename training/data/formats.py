"""Recognises the five row formats and converts rows to conversations.

=============  ===========================================================================================
``alpaca``     ``instruction``, ``output``; perhaps ``input``, ``system``
``sharegpt``   ``conversations`` of ``from``, ``value``; perhaps ``weight`` in a turn; ``system``, ``tools``
``chat``       ``messages`` of ``role``, ``content``; perhaps ``weight``, ``tool_calls`` in a turn; ``tools``
``completion`` ``prompt``, ``completion``
``text``       ``text``
=============  ===========================================================================================

Other fields are ignored; :func:`unused` returns them for the report. A null counts as absent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.data.conversation import Conversation, DataError, OnRowError, Turn, raise_error
from training.data.files import read_rows
from training.data.tools import read_calls, read_tools

AUTO = "auto"
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_ALSO_USED: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("input", "system"),
    "sharegpt": ("system", "tools"),
    "chat": ("tools",),
    "completion": (),
    "text": (),
}
_UNSUPPORTED = {"functions": "use `tools`", "function_call": "use `tool_calls`", "history": "use the chat format"}
"""Fields that would change the meaning of a row and are not supported -> what to use instead."""
_COPIED_FIELDS = ("name", "tool_call_id")
_TURN_FIELDS = frozenset({"role", "content", "from", "value", "weight", "tool_calls", *_COPIED_FIELDS})

_OPENAI: Mapping[str, str] = {
    # As OpenAI and the server map it: chat templates have no role `developer`.
    "developer": "system",
    **{role: role for role in ("system", "user", "assistant", "tool")},
}
_ROLES: Mapping[str, Mapping[str, str]] = {
    "chat": _OPENAI,
    "sharegpt": {
        **_OPENAI,
        "human": "user",
        **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
        **dict.fromkeys(("observation", "function_response"), "tool"),
    },
}


def read_conversations(
    path: Path, format: str = AUTO, on_error: OnRowError = raise_error
) -> Iterator[tuple[Conversation, str, frozenset[str]]]:
    """Yield (conversation, format, unused fields) for each row of a file. Raises DataError.

    With ``auto``, the first row that is recognised sets the format, which all other rows must have, too. Calls
    ``on_error`` for each row that cannot be read.
    """
    unknown: DataError | None = None
    for number, row in read_rows(path, on_error):
        source = f"{path}:{number}"
        try:
            if format == AUTO:
                format = recognise(row, source)
            conversation = to_conversation(row, format, source)
        except DataError as error:
            unknown = unknown or error
            on_error(error)
            continue
        yield conversation, format, unused(row, format)
    if format == AUTO and unknown is not None:
        # No row was recognised: report one error for the file instead of one for every row.
        raise unknown


def recognise(row: Mapping[str, Any], source: str) -> str:
    """Return a row's format by its fields; ``text`` only if no other format fits. Raises DataError."""
    given = [name for name, value in row.items() if value is not None]
    found = _matching(given) or _matching(list(row))
    if not found:
        fields = ", ".join(f"`{name}`" for name in list(row)[:8]) or "no fields"
        known = "; ".join(f"{format} ({', '.join(names)})" for format, names in REQUIRED.items())
        raise DataError(f"unknown format: the row has {fields}. Known formats: {known}", source)
    if len(found) > 1 and found[1] != "text":
        raise DataError(f"the row could be {' or '.join(found)}; choose with --format", source)
    return found[0]


def _matching(names: list[str]) -> list[str]:
    return [format for format, required in REQUIRED.items() if set(required) <= set(names)]


def unused(row: Mapping[str, Any], format: str) -> frozenset[str]:
    """Return the fields of a row that are not null and not used; those of turns as ``messages[].id``."""
    known = {*REQUIRED[format], *_ALSO_USED[format]}
    names = {name for name, value in row.items() if value is not None and name not in known}
    if format in _ROLES:
        list_ = REQUIRED[format][0]
        for turn in row[list_]:
            names |= {f"{list_}[].{name}" for name in turn.keys() - _TURN_FIELDS if turn[name] is not None}
    return frozenset(names)


def to_conversation(row: Mapping[str, Any], format: str, source: str) -> Conversation:
    """Check and convert one row. Raises DataError."""
    try:
        for name in REQUIRED[format]:
            if row.get(name) is None:
                raise DataError(_missing(row, name, format))
        _check_unsupported(row)
        return _PARSERS[format](row, source)
    except DataError as error:
        raise DataError(error.reason, source) from None


def _missing(row: Mapping[str, Any], name: str, format: str) -> str:
    others = [other for other in _matching([key for key, value in row.items() if value is not None]) if other != format]
    if others:
        return f"the row is {others[0]}, but the rows before it are {format}: a file must have one format"
    return f"`{name}` is {'null' if name in row else 'missing'}"


def _check_unsupported(fields: Mapping[str, Any]) -> None:
    for name, instead in _UNSUPPORTED.items():
        if fields.get(name):
            raise DataError(f"`{name}` is not supported; {instead}")


def _alpaca(row: Mapping[str, Any], source: str) -> Conversation:
    instruction, output = _text(row["instruction"], "instruction"), _text(row["output"], "output")
    further = _optional_text(row.get("input"), "input")
    question = f"{instruction}\n\n{further}" if further else instruction
    turns = [*_system(row), Turn("user", question), Turn("assistant", output, trained=True)]
    return Conversation(source, tuple(turns))


def _chat(row: Mapping[str, Any], source: str) -> Conversation:
    tools = read_tools(row.get("tools"))
    turns = _turns(row["messages"], "messages", "chat", tools or ())
    return Conversation(source, _checked(turns), tools)


def _sharegpt(row: Mapping[str, Any], source: str) -> Conversation:
    tools = read_tools(row.get("tools"))
    turns = _turns(row["conversations"], "conversations", "sharegpt", tools or ())
    return Conversation(source, _checked([*_system(row), *turns]), tools)


def _completion(row: Mapping[str, Any], source: str) -> Conversation:
    return Conversation(source, prompt=_text(row["prompt"], "prompt"), text=_text(row["completion"], "completion"))


def _plain(row: Mapping[str, Any], source: str) -> Conversation:
    return Conversation(source, text=_text(row["text"], "text"))


def _system(row: Mapping[str, Any]) -> list[Turn]:
    text = _optional_text(row.get("system"), "system")
    return [Turn("system", text)] if text else []


def _turns(messages: Any, field: str, format: str, tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    if not isinstance(messages, list):
        raise DataError(f"`{field}` must be a list of turns, not {_kind(messages)}")
    return [_turn(message, f"{field}[{index}]", format, tools) for index, message in enumerate(messages)]


def _turn(message: Any, place: str, format: str, tools: Sequence[Mapping[str, Any]]) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"`{place}` must be an object, not {_kind(message)}")
    _check_unsupported(message)
    role_field, content_field = ("role", "content") if message.get("from") is None else ("from", "value")
    name = _text(message.get(role_field), f"{place}.{role_field}")
    role = _ROLES[format].get(name)
    if role is None:
        known = ", ".join(_ROLES[format])
        raise DataError(f"`{place}.{role_field}` is {name[:40]!r}, an unknown role (known: {known})")
    more = {name: message[name] for name in _COPIED_FIELDS if message.get(name)}
    if calls := read_calls(message.get("tool_calls"), f"{place}.tool_calls", tools):
        more["tool_calls"] = calls
    content = _content(message.get(content_field), f"{place}.{content_field}", calls=bool(calls))
    return Turn(role, content, _trained(message.get("weight"), role, f"{place}.weight"), more)


def _content(value: Any, field: str, *, calls: bool) -> str:
    if calls and not value:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, f"{field}[{index}]") for index, part in enumerate(value))
    return _text(value, field)


def _part(part: Any, field: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"`{field}` must be a content part of type `text`")
    text: str = part["text"]
    return text


def _trained(weight: Any, role: str, field: str) -> bool:
    """Return whether a turn is trained on: the assistant's are, except those with weight 0."""
    if weight is None:
        return role == "assistant"
    if isinstance(weight, str | list | dict) or weight not in (0, 1):
        raise DataError(f"`{field}` must be 0 or 1 (got {str(weight)[:20]})")
    if weight and role != "assistant":
        raise DataError(f"`{field}` is 1, but only the assistant's turns are trained on")
    return bool(weight)


def _checked(turns: list[Turn]) -> tuple[Turn, ...]:
    dialogue = [turn for turn in turns if turn.role != "system"]
    if not any(turn.role == "assistant" for turn in dialogue):
        raise DataError("the assistant has no turn")
    if dialogue[0].role != "user":
        raise DataError(f"the first turn after the system turn must be the user's, not the {dialogue[0].role}'s")
    if turns[-1].role != "assistant":
        raise DataError(f"the last turn must be the assistant's, not the {turns[-1].role}'s")
    if not any(turn.trained for turn in turns):
        raise DataError("every turn of the assistant has weight 0: there is no token to train on")
    return tuple(turns)


def _optional_text(value: Any, field: str) -> str:
    return "" if value is None or (isinstance(value, str) and not value.strip()) else _text(value, field)


def _text(value: Any, field: str) -> str:
    """Return ``value`` if it is text that is not empty and can be tokenized. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"`{field}` must be text, not {_kind(value)}")
    if not value.strip():
        raise DataError(f"`{field}` is empty")
    if "\0" in value:
        raise DataError(f"`{field}` has a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"`{field}` has half a surrogate pair at character {error.start + 1}") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null or missing"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


_PARSERS: Mapping[str, Callable[[Mapping[str, Any], str], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "chat": _chat,
    "completion": _completion,
    "text": _plain,
}
