"""The grammar of demanded calls: llguidance takes what each convention writes, and nothing else."""

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from server.parsers.answers import AnswerSyntax
from server.parsers.reasoning import MARKERS, ReasoningMarkers
from server.parsers.tool_formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, PHI, ToolFormat
from server.parsers.tool_grammar import calls_grammar
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
    special = {token.content: id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    grammar = calls_grammar(AnswerSyntax(tools=form, **answer), TOOLS, parallel=parallel, token_id=special.get)
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
