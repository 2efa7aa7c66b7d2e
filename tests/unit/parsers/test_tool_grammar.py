"""The grammars of calls: llguidance takes what each convention writes, and nothing else."""

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from server.parsers.answers import AnswerSyntax
from server.parsers.reasoning import MARKERS, ReasoningMarkers
from server.parsers.tool_formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, PHI, QWEN_XML, ToolFormat
from server.parsers.tool_grammar import calls_grammar, strict_grammar
from server.parsers.xml_calls import write_xml
from server.parsers.xml_grammar import NotEnforceable, xml_rules
from tests.tiny import tiny_tokenizer

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "where": {"$ref": "#/$defs/place"}},
    "required": ["city"],
    "$defs": {"place": {"enum": ["in", "out"]}},
}
TOOLS = [{"function": {"name": "weather", "parameters": WEATHER}}, {"function": {"name": 'add"é'}}]
W = '{"name": "weather", "arguments": {"city": "Paris", "where": "in"}}'
A = '{"name": "add\\"é", "arguments": {}}'
XML = f"<tool_call>\n{write_xml('weather', {'city': 'a <b>', 'where': 'in'})}\n</tool_call>"
NAME = 'add"é'
XML_NONE, XML_ANY = (f"<tool_call>\n{write_xml(NAME, some)}\n</tool_call>" for some in ({}, {"x": 1}))
HERMES_TWO = f"<tool_call>\n{W}\n</tool_call>\n<tool_call>\n{A}\n</tool_call>"
THINK = MARKERS[0]


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """A tokenizer in which the markers of some conventions are special tokens."""
    fast = tiny_tokenizer()
    fast.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[/THINK]"]})
    backend: Tokenizer = fast.backend_tokenizer
    return backend


def accepts(backend: Tokenizer, form: ToolFormat, text: str, *, parallel: bool = True, **answer: Any) -> bool:
    """Whether the grammar of a call takes all of ``text``, and the answer may end there."""
    grammar = calls_grammar(
        AnswerSyntax(tools=form, **answer), TOOLS, parallel=parallel, token_id=specials(backend).get
    )
    return takes(backend, grammar, text)


def specials(backend: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens by their text."""
    return {token.content: id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}


def takes(backend: Tokenizer, grammar: str, text: str) -> bool:
    """Whether a grammar takes all of ``text``, and the answer may end there."""
    tokenizer = LLTokenizer(backend.to_str(), eos_token=258)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = backend.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


ACCEPTED = {
    "hermes": (HERMES, f"<tool_call>\n{W}\n</tool_call>"),
    "hermes, two": (HERMES, HERMES_TWO),
    "llama": (LLAMA, W.replace("arguments", "parameters")),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{W}, {A}]"),
    "mistral, named": (MISTRAL_NAMED, '[TOOL_CALLS]weather[ARGS]{"city": "a"}[TOOL_CALLS]add"é[ARGS]{}'),
    "phi": (PHI, f"<|tool_call|>[{W}]<|/tool_call|>"),
    "xml": (QWEN_XML, XML),
    "xml, two": (QWEN_XML, f"{XML}\n{XML_NONE}"),
}
REFUSED = {
    "text": (HERMES, "Paris"),
    "cut": (HERMES, f"<tool_call>\n{W}"),
    "another name": (HERMES, f"<tool_call>\n{W.replace('weather', 'wether')}\n</tool_call>"),
    "an argument that is not declared": (HERMES, f"<tool_call>\n{W.replace('where', 'there')}\n</tool_call>"),
    "a value that is not allowed": (HERMES, f"<tool_call>\n{W.replace('in', 'at')}\n</tool_call>"),
    "arguments of a function without": (
        HERMES,
        '<tool_call>\n{"name": "add\\"é", "arguments": {"a": 1}}\n</tool_call>',
    ),
    "xml: a value that is not allowed": (QWEN_XML, XML.replace("\nin\n", "\nat\n")),
    "xml: a missing argument": (QWEN_XML, XML.replace("city", "where")),
    "xml: arguments of a function without": (QWEN_XML, XML_ANY),
    "the marker as text": (MISTRAL, f"[TOOL_CALLS ][{W}]"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_calls_in_each_convention_are_taken(backend: Tokenizer, case: str) -> None:
    assert accepts(backend, *ACCEPTED[case])


@pytest.mark.parametrize("case", REFUSED)
def test_all_else_is_refused(backend: Tokenizer, case: str) -> None:
    assert not accepts(backend, *REFUSED[case])


def test_one_call_where_more_are_not_wanted(backend: Tokenizer) -> None:
    assert accepts(backend, HERMES, HERMES_TWO)
    assert not accepts(backend, HERMES, HERMES_TWO, parallel=False)
    assert not accepts(backend, MISTRAL, ACCEPTED["mistral"][1], parallel=False)
    assert accepts(backend, HERMES, ACCEPTED["hermes"][1], parallel=False)


@pytest.mark.parametrize("markers", MARKERS)
def test_reasoning_may_come_first(backend: Tokenizer, markers: ReasoningMarkers) -> None:
    call = ACCEPTED["hermes"][1]
    thought = f"I so\n\nthink </thin {markers.end}\n\n{call}"
    assert accepts(backend, HERMES, markers.start + thought, reasoning=markers)
    assert accepts(backend, HERMES, call, reasoning=markers)
    assert accepts(backend, HERMES, thought, reasoning=markers, opened=True)
    assert not accepts(backend, HERMES, thought, reasoning=markers)


# --- the model decides, strict functions follow their schemas


def decides(
    backend: Tokenizer, form: ToolFormat, text: str, *, parallel: bool = True, others: bool = True, **answer: Any
) -> bool:
    """Whether the grammar of an answer with a strict function, ``weather``, takes all of ``text``.

    ``others``: text may have special tokens that are no markers.
    """
    special = specials(backend)
    ids = {id_ for name, id_ in special.items() if name not in form.markers and id_ != 258} if others else ()
    grammar = strict_grammar(
        AnswerSyntax(tools=form, **answer), TOOLS, {"weather"}, parallel=parallel, token_id=special.get, others=ids
    )
    return takes(backend, grammar, text)


def hermes(payload: str) -> str:
    return f"<tool_call>\n{payload}\n</tool_call>"


BAD = W.replace("in", "at")
ANY = '{"name": "add\\"é", "arguments": {"x": [1, {}]}}'
L, L_BAD, L_ANY = (each.replace("arguments", "parameters") for each in (W, BAD, ANY))
DECIDED: dict[str, tuple[ToolFormat, list[str], list[str]]] = {
    "hermes": (
        HERMES,
        [
            "",
            "Hello.",
            "a <tool",
            hermes(W),
            f"Let me see.\n{hermes(W)}\nDone.",
            hermes(ANY),
            HERMES_TWO,
            "a<|im_start|>b",
        ],
        [
            hermes(BAD),
            f"Let me see. {hermes(BAD)}",
            "<tool_call>",
            "<tool_call>weather",
            hermes(W.replace("weather", "x")),
        ],
    ),
    "llama": (
        LLAMA,
        [
            "",
            "Hi {",
            L,
            f" \n{L}",
            '{"name": "add", "parameters": {}}',
            '{"json": 1}',
            '{"name": "weathers"}',
            f"Hi<|python_tag|>{L}",
            f"<|python_tag|>{L_ANY}",
        ],
        [
            *(L_BAD, f" \n{L_BAD}", f"Hi<|python_tag|>{L_BAD}", "<|python_tag|>print(1)"),
            *('{"parameters": {}, "name": "weather"}', '{"name":"weather","parameters":{}}'),
            r'{"name": "\u0077eather", "parameters": {"where": "at"}}',
        ],
    ),
    "mistral": (
        MISTRAL,
        ["", "Hi", f"Hi[TOOL_CALLS][{W}, {ANY}]", f"[TOOL_CALLS][{ANY}]"],
        [f"[TOOL_CALLS][{ANY}, {BAD}]", "[TOOL_CALLS]", "[TOOL_CALLS]no"],
    ),
    "mistral, named": (
        MISTRAL_NAMED,
        ["", 'Hi[TOOL_CALLS]weather[ARGS]{"city": "a"}[TOOL_CALLS]add"é[ARGS]{"b": 1}'],
        ['[TOOL_CALLS]weather[ARGS]{"city": 1}'],
    ),
    "xml": (
        QWEN_XML,
        ["", "Hi <tool", XML, f"Hi {XML}\n{XML_ANY}!"],
        [XML.replace("\nin\n", "\nat\n"), "<tool_call>", XML.replace("weather", "x")],
    ),
    "phi": (PHI, ["", "Hi", f"<|tool_call|>[{W}, {ANY}]<|/tool_call|>!"], [f"<|tool_call|>[{BAD}]<|/tool_call|>"]),
}


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("case", DECIDED)
def test_calls_of_strict_functions_follow_their_schema(backend: Tokenizer, case: str, others: bool) -> None:
    form, good, bad = DECIDED[case]
    for text in good:
        assert decides(backend, form, text, others=others) == (others or "<|im_start|>" not in text), text
    for text in bad:
        assert not decides(backend, form, text, others=others), text


def test_one_call_at_most_where_the_model_decides(backend: Tokenizer) -> None:
    assert decides(backend, HERMES, f"a{hermes(W)}b", parallel=False)
    assert not decides(backend, HERMES, HERMES_TWO, parallel=False)


@pytest.mark.parametrize("markers", MARKERS)
def test_what_is_thought_is_no_call(backend: Tokenizer, markers: ReasoningMarkers) -> None:
    thought = f"A <tool_call> or {{ not{markers.end}\n\n"
    for form, call, wrong in (
        (HERMES, hermes(W), hermes(BAD)),
        (LLAMA, L, L_BAD),
        (MISTRAL, f"[TOOL_CALLS][{W}]", "[TOOL_CALLS]"),
    ):
        for opened in (False, True):
            begun = thought if opened else markers.start + thought
            for rest in ("", "Hello.", call):
                assert decides(backend, form, begun + rest, reasoning=markers, opened=opened), (form.name, rest)
            assert not decides(backend, form, begun + wrong, reasoning=markers, opened=opened), form.name
        assert decides(backend, form, "Hello.", reasoning=markers)
        assert decides(backend, form, call, reasoning=markers)
        assert not decides(backend, form, markers.start + "so on", reasoning=markers)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "pattern": "x"}}},
        {"properties": {"a": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}}},
        {"properties": {"a": {"allOf": [{"type": "string"}]}}},
        {"properties": {}, "required": ["b"]},
    ],
)
def test_what_cannot_be_enforced_between_tags_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(NotEnforceable):
        xml_rules(0, "f", schema)
