"""Tool calls and reasoning in a model's text, whole and in any pieces."""

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.parsers.answers import AnswerSyntax
from server.parsers.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from server.parsers.json_scanner import BrokenJson, JsonScanner
from server.parsers.reasoning import MARKERS
from server.parsers.tool_formats import (
    FORMATS,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    PHI,
    QWEN_XML,
    ToolFormat,
    format_of,
)

FUNCTIONS = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}}},
    "add": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"$ref": "#/$defs/b"},
            "c": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "$defs": {"b": {"type": ["array", "null"]}},
    },
}
THINK = MARKERS[0]
PARIS = '{"city": "Paris"}'

Joined = tuple[str, str, list[tuple[str, str]]]
"""Content, reasoning, and (name, arguments) of each call."""


def joined(deltas: Sequence[Delta]) -> Joined:
    """Join deltas as a client does; assert their order and shape."""
    content = reasoning = ""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                assert text
                content += text
            case ReasoningDelta(text):
                assert text
                reasoning += text
            case ToolCallDelta(index, id_, name, arguments) if name is not None:
                assert index == len(calls)
                assert id_
                assert not arguments
                calls.append((name, ""))
            case ToolCallDelta(index, id_, None, arguments):
                assert index == len(calls) - 1
                assert id_ is None
                calls[-1] = (calls[-1][0], calls[-1][1] + arguments)
    return content, reasoning, calls


def parse(syntax: AnswerSyntax, *pieces: str) -> Joined:
    """Parse an answer given in pieces."""
    parser = syntax.parser()
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    found = joined(deltas)
    assert parser.has_tool_calls == bool(found[2])
    return found


def tools(form: ToolFormat, *, incremental: bool = False) -> AnswerSyntax:
    """The format of an answer with tools."""
    return AnswerSyntax(tools=form, functions=FUNCTIONS, incremental=incremental)


CALLS: dict[str, tuple[ToolFormat, str, str, list[tuple[str, str]]]] = {
    "hermes": (
        HERMES,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [("weather", PARIS)],
    ),
    "hermes, two with text": (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>'
        '{"arguments": {"a": 1, "b": [2, {"c": null}]}, "name": "add"}</tool_call>\n\nDone.',
        "Let me see.Done.",
        [("weather", PARIS), ("add", '{"a": 1, "b": [2, {"c": null}]}')],
    ),
    "hermes, no end marker": (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}',
        "",
        [("weather", PARIS)],
    ),
    "hermes, arguments as text": (
        HERMES,
        r'<tool_call>{"name": "weather", "arguments": "{\"city\": \"Paris\"}"}</tool_call>',
        "",
        [("weather", PARIS)],
    ),
    "hermes, no arguments": (HERMES, '<tool_call>{"name": "weather"}</tool_call>', "", [("weather", "{}")]),
    "hermes, marker in an argument": (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>\\n<tool_call>"}}</tool_call>',
        "",
        [("weather", '{"city": "</tool_call>\\n<tool_call>"}')],
    ),
    "llama": (LLAMA, '{"name": "weather", "parameters": {"city": "Paris"}}', "", [("weather", PARIS)]),
    "llama, tag and two": (
        LLAMA,
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "add", "parameters": {"a": 1e5}}',
        "",
        [("weather", PARIS), ("add", '{"a": 1e5}')],
    ),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "add", "arguments": {}}]',
        "",
        [("weather", PARIS), ("add", "{}")],
    ),
    "mistral, named": (
        MISTRAL_NAMED,
        'Sure.[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add{"a": -1.5}',
        "Sure.",
        [("weather", PARIS), ("add", '{"a": -1.5}')],
    ),
    "phi": (
        PHI,
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|/tool_call|>',
        "",
        [("weather", PARIS)],
    ),
    "qwen, xml": (
        QWEN_XML,
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "",
        [("weather", PARIS)],
    ),
    "qwen, xml, two with text": (
        QWEN_XML,
        "Look:\n<tool_call>\n<function=weather>\n<parameter=city>\n1\n\n2 <b>\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call><function=add><parameter=a>5</parameter><parameter=b>[1, null]</parameter>"
        "<parameter=c>null</parameter><parameter=d>4</parameter></function></tool_call>\nDone.",
        "Look:Done.",
        [("weather", '{"city": "1\\n\\n2 <b>"}'), ("add", '{"a": 5, "b": [1, null], "c": null, "d": "4"}')],
    ),
    "qwen, xml, no arguments and odd values": (
        QWEN_XML,
        "<tool_call><function=add></function></tool_call><tool_call><function=add><parameter=a>True</parameter>"
        "<parameter=b>NaN</parameter></function></tool_call>",
        "",
        [("add", "{}"), ("add", '{"a": true, "b": "NaN"}')],
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_found_in_each_convention(case: str) -> None:
    form, text, content, calls = CALLS[case]
    assert parse(tools(form), text) == (content, "", calls)
    assert parse(tools(form), *text) == (content, "", calls)


BROKEN = {
    "not json": (HERMES, "<tool_call>weather in Paris</tool_call>"),
    "breaks off": (HERMES, 'Well: <tool_call>\n{"name": "weather", "arguments": {"city": "Par'),
    "xml: no function": (QWEN_XML, "<tool_call>\nweather</tool_call>"),
    "xml: unknown function": (QWEN_XML, "<tool_call><function=rm></function></tool_call>"),
    "xml: breaks off": (QWEN_XML, "A <tool_call>\n<function=weather>\n<parameter=city>\nPar"),
    "xml: text between": (QWEN_XML, "<tool_call><function=weather>Paris</function></tool_call>"),
    "xml: a long name": (QWEN_XML, f"<tool_call><function={'x' * 300}></function></tool_call>"),
    "unknown function": (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    "no name": (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    "name is no string": (HERMES, '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
    "arguments are a list": (HERMES, '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>'),
    "arguments are words": (HERMES, '<tool_call>{"name": "add", "arguments": "1 and 2"}</tool_call>'),
    "two names": (HERMES, '<tool_call>{"name": "add", "name": "weather"}</tool_call>'),
    "single quotes": (HERMES, "<tool_call>{'name': 'add'}</tool_call>"),
    "line break in a string": (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "x\ny"}}</tool_call>'),
    "only the marker": (HERMES, "I would write <tool_call>"),
    "half a marker": (HERMES, "I would write <tool_ca"),
    "the marker's beginning": (HERMES, "1 < 2 <t> </tool_call> <"),
    "json that is an answer": (LLAMA, '{"city": "Paris", "temperature": 21}'),
    "json of an answer, cut": (LLAMA, '{"name": "weather", "parameters": {"city": "Pa'),
    "json later in the text": (LLAMA, 'Call {"name": "weather", "parameters": {}}'),
    "code": (LLAMA, "<|python_tag|>print(1)"),
    "text in the array": (MISTRAL, '[TOOL_CALLS] [weather, "add"]'),
    "a name that is long": (MISTRAL_NAMED, "[TOOL_CALLS]" + "weather " * 60 + "{}"),
    "deep": (HERMES, '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}</tool_call>"),
    "white space": (HERMES, " \n\n "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_call_stays_text(case: str) -> None:
    form, text = BROKEN[case]
    assert parse(tools(form), text) == (text, "", [])
    assert parse(tools(form), *text) == (text, "", [])


def test_a_good_call_after_a_broken_one_is_found() -> None:
    good = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    broken = '<tool_call>{"name": add <tool_call>{"x"'
    assert parse(tools(HERMES), broken + good) == (broken, "", [("add", '{"a": 1}')])
    mixed = '[TOOL_CALLS][{"name": "add", "arguments": {}}, {"name": add}]'
    assert parse(tools(MISTRAL), mixed) == (', {"name": add}]', "", [("add", "{}")])


def test_arguments_come_as_they_are_written_under_a_grammar() -> None:
    parser = tools(HERMES, incremental=True).parser()
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    steps = [parser.push(character) for character in text]
    name = text.index('{"city')
    assert [len(step) for step in steps[:name]] == [0] * name
    first = steps[name][0]
    assert isinstance(first, ToolCallDelta)
    assert first.name == "weather"
    assert first.id
    assert joined([delta for step in steps for delta in step]) == ("", "", [("weather", PARIS)])
    assert sum(map(len, steps)) == 1 + len(PARIS)


def test_arguments_that_break_off_under_a_grammar_are_those_that_have_come() -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa'
    assert parse(tools(HERMES, incremental=True), text) == ("", "", [("weather", '{"city": "Pa')])


@pytest.mark.parametrize("cut", ["<tool_", "<tool_call>", '<tool_call>\n{"name": "wea'])
def test_the_beginning_of_a_demanded_call_is_no_content(cut: str) -> None:
    first = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n'
    assert parse(tools(HERMES, incremental=True), cut) == ("", "", [])
    assert parse(tools(HERMES, incremental=True), first + cut) == ("", "", [("weather", PARIS)])
    assert parse(tools(HERMES), cut) == (cut, "", [])


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize(
    ("form", "call", "rest"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}', "\n</tool_call>"),
        (PHI, '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}', " ]<|/tool_call|>"),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}', ", "),
    ],
)
def test_what_is_cut_off_behind_a_call_is_no_content(
    form: ToolFormat, call: str, rest: str, *, incremental: bool
) -> None:
    for length in range(len(rest) + 1):
        text = call + rest[:length]
        assert parse(tools(form, incremental=incremental), text) == ("", "", [("weather", PARIS)])
        assert parse(tools(form, incremental=incremental), *text) == ("", "", [("weather", PARIS)])


@pytest.mark.parametrize("case", CALLS)
def test_whole_and_incremental_find_the_same(case: str) -> None:
    form, text, _, calls = CALLS[case]
    if "text" not in case and "no arguments" not in case:
        assert parse(tools(form, incremental=True), text)[2] == calls


REASONING = {
    "think first": (False, "<think>\nI add.\n</think>\n\nIt is 3.", "It is 3.", "I add."),
    "opened by the prompt": (True, "I add.\n\n</think>\n\nIt is 3.", "It is 3.", "I add."),
    "opened twice": (True, "<think>\nI add.</think>It is 3.", "It is 3.", "I add."),
    "none": (False, "It is 3. <think>no</think>", "It is 3. <think>no</think>", ""),
    "not ended": (False, "<think>I add. </thi", "", "I add. </thi"),
    "opened, not ended": (True, "I add", "", "I add"),
    "empty": (False, "<think>\n\n</think>\n\n3", "3", ""),
    "half a marker": (False, " <thin", " <thin", ""),
    "lines within": (False, "<think>a\n\n b </ c</think>d", "d", "a\n\n b </ c"),
}


@pytest.mark.parametrize("case", REASONING)
def test_reasoning_is_separated(case: str) -> None:
    opened, text, content, reasoning = REASONING[case]
    form = AnswerSyntax(reasoning=THINK, opened=opened)
    assert parse(form, text) == (content, reasoning, [])
    assert parse(form, *text) == (content, reasoning, [])


def test_calls_in_the_reasoning_are_none() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    form = AnswerSyntax(THINK, False, HERMES, FUNCTIONS)
    assert parse(form, f"<think>{call}</think>Hm.{call}") == ("Hm.", call, [("add", "{}")])


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>"),
        *("</think>", "[", "]", "{", "}", ",", ";", ":", '"', "\\", "\n", " ", "1", "-", "true", "é😀", "\\u00e9"),
        *('{"name": "add", "arguments": {"a": 1}}', '{"name": "weather", "parameters": {}}', '"name": ', '"add"'),
        *('"arguments": ', "<|tool_call|>", "<|/tool_call|>", "weather"),
        *("<function=add>", "<parameter=", "a>", "</parameter>", "</function>", "<function="),
    ]
)


@given(
    st.lists(FRAGMENTS, max_size=12),
    st.lists(st.integers(0, 200), max_size=8),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([None, True, False]),
    st.booleans(),
)
def test_pieces_do_not_matter(
    fragments: list[str], cuts: list[int], name: str, opened: bool | None, incremental: bool
) -> None:
    text = "".join(fragments)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(edges)]
    reasoning = None if opened is None else THINK
    form = AnswerSyntax(reasoning, bool(opened), FORMATS[name], FUNCTIONS, incremental)
    whole = parse(form, text)
    assert parse(form, *pieces) == whole == parse(form, *text)
    for called, arguments in whole[2]:
        assert called in FUNCTIONS
        assert incremental or isinstance(json.loads(arguments), dict)
    if opened is None and not whole[2]:
        assert text.startswith(whole[0]), "text that is no call is not changed"
        assert incremental or whole[0] == text, "nor is it lost"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON), st.sampled_from([None, 1]), st.booleans())
def test_the_scanner_reads_what_json_writes(value: dict[str, object], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    scanner = JsonScanner()
    for character in text:
        assert not scanner.done
        scanner.feed(character)
    assert scanner.done
    spans = list(scanner.fields.values())
    assert [json.loads(text[span.begin : span.end]) for span in spans] == list(value.values())


@given(st.text('{}[]",:0123456789.-+eEtruefalsn\\/u \n\x01a', max_size=20))
def test_the_scanner_takes_what_json_takes(tail: str) -> None:
    text = "{" + tail
    scanner, done = JsonScanner(), False
    try:
        for index, character in enumerate(text):
            if scanner.done:
                done = not text[index:].strip(" \t\n\r")
                break
            scanner.feed(character)
        else:
            done = scanner.done
    except BrokenJson as error:
        if "twice" in str(error):
            return  # json takes the last one
        done = False
    try:
        json.loads(text)
        valid = True
    except ValueError:
        valid = False
    assert done == valid


def test_conventions_are_told_by_the_template() -> None:
    assert format_of("... <tool_call>\n{{ call | tojson }}\n</tool_call>") is HERMES
    assert format_of("<tool_call>\n<function=") is QWEN_XML
    assert format_of("<tool_call>\n<arg_key>") is None
    assert format_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is MISTRAL_NAMED
    assert format_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert format_of("{{ '<|python_tag|>' }}") is LLAMA
    assert format_of("{{ message.content }}") is None
