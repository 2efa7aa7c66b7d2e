"""OpenAI's own client with the demo model: sync, async, streaming helpers, ``parse``, tools, embeddings, responses."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI
from pydantic import BaseModel, Field

from tests.api.live import Live

pytestmark = pytest.mark.demo

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ORDER: Any = [{"role": "user", "content": "Two lamps and a chair for Köln, please."}]


class Address(BaseModel):
    street: str = Field(max_length=30)
    city: Literal["Köln", "東京", "New York"]


class Item(BaseModel):
    name: Literal["lamp", "chair", "table"]
    quantity: int = Field(ge=1, le=20)


class Order(BaseModel):
    """An order from a shop."""

    items: list[Item] = Field(min_length=1, max_length=3)
    address: Address | None
    express: bool


class OpeningHours(BaseModel):
    """Return the opening hours of the shop on a day."""

    day: Literal["Monday", "Sunday"]


@pytest.fixture
def sdk(demo: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo.http.base_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def greedy(model: str) -> dict[str, Any]:
    return {"model": model, "temperature": 0, "max_tokens": 40}


def test_chat_names_the_adapter(sdk: OpenAI, greedy: dict[str, Any]) -> None:
    answer = sdk.chat.completions.create(messages=QUESTION, **greedy)
    assert answer.choices[0].message.content
    used = answer.model_dump()["adapter"]
    assert ("red@1" in json.dumps(used)) == (greedy["model"] == "red")


def test_async_requests_side_by_side(demo: Live, greedy: dict[str, Any]) -> None:
    async def answers() -> set[str | None]:
        async with AsyncOpenAI(base_url=f"{demo.http.base_url}/v1", api_key="none", max_retries=0) as client:
            asked = [client.chat.completions.create(messages=QUESTION, **greedy) for _ in range(6)]
            return {answer.choices[0].message.content for answer in await asyncio.gather(*asked)}

    assert len(asyncio.run(answers())) == 1


def test_the_streaming_helper(sdk: OpenAI, greedy: dict[str, Any]) -> None:
    # One sentence, for the helper raises if an answer is cut off: how long one is depends on the processor's rounding.
    asked = {**greedy, "max_tokens": 200, "stop": ".", "messages": [{"role": "user", "content": "Tell me a story."}]}
    whole = sdk.chat.completions.create(**asked)
    with sdk.chat.completions.stream(stream_options={"include_usage": True}, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.delta") > 3
    assert kinds.count("content.done") == 1
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage
    assert whole.usage
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_parse(sdk: OpenAI, greedy: dict[str, Any]) -> None:
    asked = {**greedy, "max_tokens": 300}
    parsed = sdk.chat.completions.parse(messages=ORDER, response_format=Order, **asked).choices[0].message.parsed
    assert isinstance(parsed, Order)
    with sdk.chat.completions.stream(messages=ORDER, response_format=Order, **asked) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_parse_reports_an_answer_that_was_cut_off(sdk: OpenAI, greedy: dict[str, Any]) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        sdk.chat.completions.parse(messages=ORDER, response_format=Order, **{**greedy, "max_tokens": 4})


def test_several_answers_and_log_probabilities(sdk: OpenAI, greedy: dict[str, Any]) -> None:
    asked = {**greedy, "temperature": 1, "seed": 3}
    answer = sdk.chat.completions.create(messages=QUESTION, n=3, logprobs=True, top_logprobs=2, **asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == choice.message.content


def test_a_tool_loop(sdk: OpenAI, greedy: dict[str, Any]) -> None:
    tools = [openai.pydantic_function_tool(OpeningHours), openai.pydantic_function_tool(Order)]
    turns = list(QUESTION)
    named: Any = {"type": "function", "function": {"name": "OpeningHours"}}
    single = {"parallel_tool_calls": False}  # else a small model goes on calling
    called = sdk.chat.completions.parse(messages=turns, tools=tools, tool_choice=named, **single, **greedy).choices[0]
    assert called.finish_reason in {"tool_calls", "stop"}
    (call,) = called.message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, OpeningHours)
    turns += [called.message, {"role": "tool", "tool_call_id": call.id, "content": "9 to 17"}]
    last = sdk.chat.completions.create(messages=turns, tools=tools, tool_choice="none", **greedy).choices[0]
    assert last.message.content
    assert not last.message.tool_calls


def test_the_streaming_helper_with_tools(sdk: OpenAI, greedy: dict[str, Any]) -> None:
    tools = [openai.pydantic_function_tool(OpeningHours)]
    asked = {**greedy, "messages": QUESTION, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    with sdk.chat.completions.stream(**asked) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in done] == ["OpeningHours"]
    assert isinstance(done[0].parsed_arguments, OpeningHours)


def test_embeddings(sdk: OpenAI, model: str) -> None:
    texts = ["Paris is the capital of France.", "Bread is baked in an oven."]
    packed = sdk.embeddings.create(model=model, input=texts)  # the client asks for base64 by itself
    plain = sdk.embeddings.create(model=model, input=texts, encoding_format="float")
    vectors = np.array([each.embedding for each in packed.data])
    assert vectors.shape == (2, 576)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert np.allclose(vectors, [each.embedding for each in plain.data], atol=1e-3)
    short = sdk.embeddings.create(model=model, input=texts[0], dimensions=64).data[0].embedding
    assert len(short) == 64


def test_responses(sdk: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 40, "store": False}
    answer = sdk.responses.create(input="What is the capital of France?", instructions="Be brief.", **asked)
    assert answer.output_text
    with sdk.responses.stream(input="What is the capital of France?", instructions="Be brief.", **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == answer.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] in {"response.completed", "response.incomplete"}


def test_parsed_responses_and_tools(sdk: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 300, "store": False}
    parsed = sdk.responses.parse(input=ORDER[0]["content"], text_format=Order, **asked)
    assert isinstance(parsed.output_parsed, Order)
    tool = {"type": "function", "name": "hours", "parameters": OpeningHours.model_json_schema(), "strict": True}
    tool["parameters"]["additionalProperties"] = False
    answer = sdk.responses.create(input="When?", tools=[tool], tool_choice="required", **asked)  # type: ignore[list-item]
    calls = [each for each in answer.output if each.type == "function_call"]
    assert calls
    OpeningHours.model_validate_json(calls[0].arguments)
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "9 to 17"}
    turns: Any = [{"role": "user", "content": "When?"}, *(each.to_dict() for each in calls[:1]), result]
    assert sdk.responses.create(input=turns, **{**asked, "max_output_tokens": 30}).output_text


def test_models(sdk: OpenAI) -> None:
    names = [each.id for each in sdk.models.list()]
    assert {"smollm2-135m-instruct", "red"} <= set(names)
    assert sdk.models.retrieve("red").id == "red"
    with pytest.raises(NotFoundError):
        sdk.models.retrieve("nobody")
