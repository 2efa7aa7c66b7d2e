"""The grammar of tool calls that a request demands, in Lark's syntax as llguidance reads it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.parsers.answers import AnswerSyntax
from server.parsers.tool_formats import ToolFormat

MAX_CALLS = 16
"""Calls in one answer: without a limit, a small model may never stop."""
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, which is how templates write calls."""

TokenId = Callable[[str], int | None]
"""Text -> the id of the special token with this text, None if there is none."""


def calls_grammar(
    answer: AnswerSyntax, tools: Sequence[Mapping[str, Any]], *, parallel: bool, token_id: TokenId
) -> str:
    """Return a grammar of a call of one of ``tools``, or with ``parallel`` of several; reasoning may come before it.

    Texts of the convention that are special tokens become these tokens.
    """
    form = answer.tools
    assert form is not None, "the caller has checked that the model's way of calling tools is known"
    rules = [f"start: {_reasoning(answer, token_id)}{_calls(form, parallel and not form.one_call, token_id)}"]
    rules += ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        function = tool["function"]
        rules.append(f"call_{index}: {_call(form, function['name'], index, token_id)}")
        rules.append(f"arguments_{index}: %json {json.dumps(_schema(function.get('parameters')))}")
    if answer.reasoning is not None:
        rules += _thought(answer.reasoning.end, token_id)
    return "\n".join(rules) + "\n"


def _reasoning(answer: AnswerSyntax, token_id: TokenId) -> str:
    if answer.reasoning is None:
        return ""
    thought = "thought /\\s*/"
    return f"{thought} " if answer.opened else f"({_literal(answer.reasoning.start, token_id)} {thought})? "


def _thought(end: str, token_id: TokenId) -> list[str]:
    """Return the rules of the reasoning up to its end marker."""
    token = token_id(end)
    if token is not None:
        return [f"thought: /(.|\\n)*/ <[{token}]>"]
    pattern = re.escape(end).replace("/", r"\/")
    return [f"thought[lazy]: /(.|\\n)*{pattern}/"]


def _calls(form: ToolFormat, parallel: bool, token_id: TokenId) -> str:
    """Return the expression for all calls, whose JSON is ``call``."""
    start, end = _literal(form.start, token_id), _literal(form.end, token_id)
    if form.payload == "array":
        more = f' (", " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
        return f'{start} "[" call{more} "]" {end}'.rstrip()
    one = "call" if form.bare else f'{start} "\\n" call "\\n" {end}' if form.end else f"{start} call"
    between = '"\\n" ' if form.end else ""
    return f"{one} ({between}{one}){{0,{MAX_CALLS - 1}}}" if parallel else one


def _call(form: ToolFormat, name: str, index: int, token_id: TokenId) -> str:
    if form.payload == "named":
        return f"{_text(name)} {_literal(form.before_arguments, token_id)} arguments_{index}"
    head = '{"name": ' + json.dumps(name, ensure_ascii=False) + f', "{form.arguments}": '
    return f'{_text(head)} arguments_{index} "}}"'


def _schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of the arguments. They are an object, and without a word on others those that are declared."""
    schema = {"type": "object", **(parameters or {}), "x-guidance": _LAYOUT}
    if "properties" in schema or not parameters:
        schema.setdefault("additionalProperties", False)
    return schema


def _literal(text: str, token_id: TokenId) -> str:
    if not text:
        return ""
    token = token_id(text)
    return _text(text) if token is None else f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
