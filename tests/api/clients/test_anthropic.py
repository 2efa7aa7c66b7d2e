"""Anthropic's own client with the demo model: messages, streams, tools, and the count of tokens."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.api.live import Live

pytestmark = pytest.mark.demo

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
TOOL: Any = {
    "name": "opening_hours",
    "description": "Return the opening hours of the shop on a day.",
    "input_schema": {
        "type": "object",
        "properties": {"day": {"enum": ["Monday", "Sunday"]}},
        "required": ["day"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def sdk(demo: Live) -> Iterator[Anthropic]:
    with Anthropic(base_url=str(demo.http.base_url), api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def greedy(model: str) -> dict[str, Any]:
    """The client has no argument for a temperature any more."""
    return {"model": model, "max_tokens": 40, "extra_body": {"temperature": 0}}


def test_messages(sdk: Anthropic, greedy: dict[str, Any]) -> None:
    answer = sdk.messages.create(messages=QUESTION, system="Be brief.", **greedy)
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.stop_reason in {"end_turn", "max_tokens"}
    assert answer.usage.output_tokens > 0


def test_the_streaming_helper(sdk: Anthropic, greedy: dict[str, Any]) -> None:
    whole = sdk.messages.create(messages=QUESTION, **greedy)
    with sdk.messages.stream(messages=QUESTION, **greedy) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].type == "text"
    assert whole.content[0].type == "text"
    assert text == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == whole.stop_reason


def test_async(demo: Live, greedy: dict[str, Any]) -> None:
    async def stop_reason() -> str | None:
        async with AsyncAnthropic(base_url=str(demo.http.base_url), api_key="none", max_retries=0) as client:
            return (await client.messages.create(messages=QUESTION, **greedy)).stop_reason

    assert asyncio.run(stop_reason()) in {"end_turn", "max_tokens"}


def test_a_tool_loop(sdk: Anthropic, greedy: dict[str, Any]) -> None:
    turns = list(QUESTION)
    choice: Any = {"type": "tool", "name": "opening_hours"}
    called = sdk.messages.create(messages=turns, tools=[TOOL], tool_choice=choice, **greedy)
    (call,) = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use"
    assert call.input in ({"day": "Monday"}, {"day": "Sunday"})
    with sdk.messages.stream(messages=turns, tools=[TOOL], tool_choice=choice, **greedy) as stream:
        streamed = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert [block.input for block in streamed] == [call.input]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "9 to 17"}
    turns += [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    last = sdk.messages.create(messages=turns, tools=[TOOL], tool_choice={"type": "none"}, **greedy)
    assert last.content[0].type == "text"


def test_count_tokens(sdk: Anthropic, greedy: dict[str, Any]) -> None:
    counted = sdk.messages.count_tokens(model=greedy["model"], messages=QUESTION, system="Be brief.")
    answer = sdk.messages.create(messages=QUESTION, system="Be brief.", **greedy)
    cached = answer.usage.cache_read_input_tokens or 0  # counted apart in Anthropic's answers
    assert counted.input_tokens == answer.usage.input_tokens + cached


def test_errors_are_of_the_right_class(sdk: Anthropic, greedy: dict[str, Any]) -> None:
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(messages=QUESTION, **{**greedy, "model": "nobody"})
    with pytest.raises(anthropic.BadRequestError):
        sdk.messages.create(messages=QUESTION, **{**greedy, "extra_body": {"temperature": 7}})
