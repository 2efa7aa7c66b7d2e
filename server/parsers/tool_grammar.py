"""Grammars of answers with tool calls, in Lark's syntax as llguidance reads it.

One is of the calls that a request demands. In the other the model decides whether it calls, but its calls follow the
schemas of strict functions.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from server.parsers.answers import AnswerSyntax
from server.parsers.reasoning import ReasoningMarkers
from server.parsers.tool_formats import ToolFormat
from server.parsers.xml_grammar import xml_rules
from server.structured.spec import with_whitespace

MAX_CALLS = 16
"""Calls in one answer: without a limit, a small model may never stop."""
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, which is how templates write calls."""
_ANY = r"(.|\n)"

TokenId = Callable[[str], int | None]
"""Text -> the id of the special token with this text, None if there is none."""


def calls_grammar(
    answer: AnswerSyntax, tools: Sequence[Mapping[str, Any]], *, parallel: bool, token_id: TokenId
) -> str:
    """Return a grammar of a call of one of ``tools``, or with ``parallel`` of several; reasoning may come before it.

    Texts of the convention that are special tokens become these tokens.
    """
    form = _form(answer)
    thought = "" if answer.reasoning is None else "thought /\\s*/ " if answer.opened else "(thought /\\s*/)? "
    rules = [f"start: {thought}{_calls(form, parallel and not form.one_call, token_id)}"]
    return _grammar(answer, rules, [(tool, True) for tool in tools], token_id)


def strict_grammar(
    answer: AnswerSyntax,
    tools: Sequence[Mapping[str, Any]],
    strict: Collection[str],
    *,
    parallel: bool,
    token_id: TokenId,
    others: Collection[int] = (),
) -> str:
    """Return a grammar of an answer with any text, in which what begins like a call is one of ``tools``.

    The arguments of the functions named in ``strict`` follow their schemas, those of others are any object. Without
    ``parallel``, there is at most one call. ``others`` are special tokens that the text may have besides the markers.
    """
    form = _form(answer)
    parallel = parallel and not form.one_call
    token, body = token_id(form.start), _body(form, parallel, token_id)
    count = "*" if parallel and form.payload != "array" else "?"
    special = f"<[{','.join(map(str, sorted(others)))}]>"
    head, tail = (f"(TEXT? {special})* ", f" ({special} TEXT?)*") if others else ("", "")
    start = f"(strict | FIRST)?{tail}" if form.bare else f"TEXT?{tail}"
    if token is not None:
        start += f" (<[{token}]> {body} TEXT?{tail}){count}"
    elif not form.bare:
        start = f"({head}before {body}){count} {head}TEXT?"
    marker, begun = _pattern(form.start), ""
    if answer.reasoning is not None:
        start = f"thought {start}" if answer.opened else f"thought? {start}"
        begun = f" & ~/\\s*{_pattern(answer.reasoning.start)}{_ANY}*/"  # it begins nothing but a thought
    rules = [f"start: {start}", f"TEXT: /{_ANY}+/ & ~/{_ANY}*{marker}{_ANY}*/{begun}"]
    if form.bare:
        rules += [f"FIRST: TEXT & ~/{_bare_call(strict)}/", *_bare(form, tools, strict)]
    elif token is None:
        rules.append(f"before[lazy]: /{_ANY}*{marker}/{begun}")
    return _grammar(answer, rules, [(tool, tool["function"]["name"] in strict) for tool in tools], token_id)


def _form(answer: AnswerSyntax) -> ToolFormat:
    assert answer.tools is not None, "the caller has checked that the model's way of calling tools is known"
    return answer.tools


def _grammar(
    answer: AnswerSyntax, rules: list[str], tools: Sequence[tuple[Mapping[str, Any], bool]], token_id: TokenId
) -> str:
    """Return ``rules`` with those of ``call``: one of ``tools``, each with whether it follows its schema.

    Raises NotEnforceable if it cannot in this convention.
    """
    form = _form(answer)
    rules = [*rules, "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, (tool, strict) in enumerate(tools):
        function = tool["function"]
        if form.payload == "xml":
            rules += xml_rules(index, function["name"], _schema(function.get("parameters")) if strict else None)
            continue
        schema = _schema(function.get("parameters")) if strict else with_whitespace({"type": "object"})
        rules.append(f"call_{index}: {_call(form, function['name'], index, token_id)}")
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
    if answer.reasoning is not None:
        rules += _thought(answer.reasoning, token_id, opened=answer.opened)
    return "\n".join(dict.fromkeys(rules)) + "\n"


def _bare(form: ToolFormat, tools: Sequence[Mapping[str, Any]], strict: Collection[str]) -> list[str]:
    """Return the rules of a strict function's call at the beginning of an answer, without a marker."""
    rules = []
    for index, tool in enumerate(tools):
        if (name := tool["function"]["name"]) in strict:
            rules.append(f'strict_{index}: /\\s*{_pattern(_head(form, name))}/ arguments_{index} "}}"')
    return ["strict: " + " | ".join(rule.partition(":")[0] for rule in rules), *rules]


def _bare_call(names: Collection[str]) -> str:
    """Return a pattern of text that begins with an object that names one of these functions, or that may."""
    named = "|".join([*(_pattern(json.dumps(name, ensure_ascii=False)[1:]) for name in sorted(names)), r'[^"]*\\'])
    return rf'\s*\{{{_ANY}*"name"\s*:\s*"({named}){_ANY}*'


def _thought(markers: ReasoningMarkers, token_id: TokenId, *, opened: bool) -> list[str]:
    """Return the rules of the reasoning up to its end marker, with its start marker unless that was ``opened``."""
    start, end = token_id(markers.start), token_id(markers.end)
    before = f"<[{start}]> " if start is not None and not opened else ""
    text = f"{_ANY}*" if start is not None or opened else f"\\s*{_pattern(markers.start)}{_ANY}*"
    if end is not None:
        return [f"thought: {before}/{text}/ <[{end}]>"]
    return [f"thought: {before}thinking", f"thinking[lazy]: /{text}{_pattern(markers.end)}/"]


def _calls(form: ToolFormat, parallel: bool, token_id: TokenId) -> str:
    """Return the expression for all calls, whose JSON is ``call``."""
    one = "call" if form.bare else f"{_literal(form.start, token_id)} {_body(form, parallel, token_id)}"
    between = '"\\n" ' if form.end else ""
    return f"{one} ({between}{one}){{0,{MAX_CALLS - 1}}}" if parallel and form.payload != "array" else one


def _body(form: ToolFormat, parallel: bool, token_id: TokenId) -> str:
    """Return the expression for what follows the start marker: one call, or an array of them."""
    end = _literal(form.end, token_id)
    if form.payload == "array":
        more = f' (", " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
        return f'"[" call{more} "]" {end}'.rstrip()
    return f'"\\n" call "\\n" {end}' if end else "call"


def _call(form: ToolFormat, name: str, index: int, token_id: TokenId) -> str:
    if form.payload == "named":
        return f"{_text(name)} {_literal(form.before_arguments, token_id)} arguments_{index}"
    return f'{_text(_head(form, name))} arguments_{index} "}}"'


def _head(form: ToolFormat, name: str) -> str:
    """Return the text of a call up to its arguments."""
    return '{"name": ' + json.dumps(name, ensure_ascii=False) + f', "{form.arguments}": '


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


def _pattern(text: str) -> str:
    """Return a regular expression for a text, between slashes."""
    return re.escape(text).replace("/", r"\/")
