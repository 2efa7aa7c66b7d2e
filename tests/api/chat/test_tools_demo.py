"""Tools with the demo model, whose chat template knows none: demanded calls parse in every try at temperature 1."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from bases.model_source import DEMO_NAME
from tests.api.live import Live

pytestmark = pytest.mark.demo

SCHEMAS: dict[str, dict[str, Any]] = {
    "book_table": {
        "type": "object",
        "properties": {
            "restaurant": {"type": "string", "maxLength": 30},
            "guests": {"type": "integer", "minimum": 1, "maximum": 20},
            "wishes": {"type": "array", "items": {"enum": ["window", "quiet", "vegan"]}, "maxItems": 2},
            "contact": {"$ref": "#/$defs/contact"},
        },
        "required": ["restaurant", "guests", "wishes", "contact"],
        "$defs": {
            "contact": {
                "type": "object",
                "properties": {"phone": {"type": "string", "pattern": "^[0-9]{6}$"}},
                "required": ["phone"],
                "additionalProperties": False,
            }
        },
    },
    "opening_hours": {
        "type": "object",
        "properties": {"restaurant": {"type": "string", "maxLength": 30}, "day": {"enum": ["Monday", "Sunday"]}},
        "required": ["restaurant"],
    },
}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]
MESSAGES: Any = [{"role": "user", "content": "Please book a quiet table for four at Chez Léon."}]
NAMED: Any = {"type": "function", "function": {"name": "opening_hours"}}


@pytest.fixture(scope="module")
def sdk(demo: Live) -> Iterator[OpenAI]:
    """OpenAI's client."""
    with OpenAI(base_url=f"{demo.http.base_url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def call(sdk: OpenAI, model: str, seed: int, choice: Any) -> list[tuple[str, str]]:
    """Names and arguments of the calls in an answer; every third one streamed."""
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": seed}
    parallel = seed % 3 == 1  # a small model goes on with further calls until the limit, which ends the SDK's stream
    asked |= {"temperature": 1, "max_tokens": 250, "parallel_tool_calls": parallel}
    if seed % 3 == 0:
        with sdk.chat.completions.stream(**asked) as stream:
            chosen = stream.get_final_completion().choices[0]
    else:
        chosen = sdk.chat.completions.create(**asked).choices[0]
    assert not chosen.message.content
    calls = [(each.function.name, each.function.arguments) for each in chosen.message.tool_calls or ()]
    if chosen.finish_reason == "length":  # a model that goes on with further calls: the last one is cut off
        calls.pop()
    else:
        assert chosen.finish_reason == "tool_calls"
    return calls


@pytest.mark.parametrize("tries", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [DEMO_NAME, "red"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_demanded_calls_parse_in_every_try(sdk: OpenAI, model: str, choice: Any, tries: int) -> None:
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda seed: call(sdk, model, seed, choice), range(tries)))
    for seed, calls in enumerate(found):
        assert calls
        assert seed % 3 == 1 or len(calls) == 1
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
            assert choice == "required" or name == "opening_hours"
    assert len({json.dumps(calls) for calls in found}) > tries / 3, "they differ"


def test_a_tool_loop(sdk: OpenAI) -> None:
    turns = list(MESSAGES)
    asked: dict[str, Any] = {"model": DEMO_NAME, "tools": TOOLS, "temperature": 0}
    first = sdk.chat.completions.create(**asked, messages=turns, tool_choice=NAMED, max_tokens=200)
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "From 12 to 23 h."}
    turns += [message, result]
    last = sdk.chat.completions.create(**asked, messages=turns, tool_choice="none", max_tokens=30)
    assert last.choices[0].message.content
    assert last.usage
    assert first.usage
    assert last.usage.prompt_tokens > 60


def test_a_stream_equals_the_answer_with_tools_in_auto_mode(demo: Live) -> None:
    asked = {"messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 60}
    whole = demo.http.post("/v1/chat/completions", json=asked).json()["choices"][0]
    chunks = demo.stream("/v1/chat/completions", **asked)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == (whole["message"]["content"] or "")
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_a_call_of_a_strict_function_follows_its_schema(sdk: OpenAI) -> None:
    """The model repeats the calls that it has seen, whose arguments are not those that the schema wants.

    It has seen the same call so often that every token of its repetition is 50 times as likely as any other: no
    processor's rounding makes it write something else.
    """
    asked = "What is the weather in Rome?"
    function = {"name": "weather", "arguments": json.dumps({"location": "Rome"})}
    messages: list[Any] = [{"role": "user", "content": asked}]
    for number in range(8):
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": asked}]
    schema = {
        "type": "object",
        "properties": {"town": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["town", "days"],
        "additionalProperties": False,
    }
    called = {}
    for strict in (False, True):
        tool: Any = {"type": "function", "function": {"name": "weather", "parameters": schema, "strict": strict}}
        answer = sdk.chat.completions.create(
            model=DEMO_NAME, messages=messages, tools=[tool], temperature=0, max_tokens=60
        )
        [found, *_] = answer.choices[0].message.tool_calls or [None]
        assert found is not None, answer.choices[0].message.content
        called[strict] = json.loads(found.function.arguments)
    assert called[False] == {"location": "Rome"}
    jsonschema.validate(called[True], schema)
