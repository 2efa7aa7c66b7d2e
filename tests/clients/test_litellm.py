"""litellm: as the provider ``openai`` with another address, and as ``hosted_vllm``."""

import asyncio
import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ORDER = [{"role": "user", "content": "Two lamps, please."}]


class Order(BaseModel):
    item: Literal["lamp", "chair", "table"]
    quantity: int = Field(ge=1, le=20)


TOOLS = [{"type": "function", "function": {"name": "order", "parameters": Order.model_json_schema()}}]


@pytest.fixture(params=["openai", "hosted_vllm"])
def ask(request: pytest.FixtureRequest, url: str, model: str) -> dict[str, Any]:
    """Arguments that all calls share."""
    return {"model": f"{request.param}/{model}", "api_base": url, "api_key": "none", "num_retries": 0}


@pytest.fixture
def greedy(ask: dict[str, Any]) -> dict[str, Any]:
    return {**ask, "temperature": 0, "max_tokens": 48}


def test_completion(greedy: dict[str, Any]) -> None:
    answer = litellm.completion(messages=MESSAGES, **greedy)
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > answer.usage.completion_tokens > 0


def test_a_stream_gives_the_same_answer(greedy: dict[str, Any]) -> None:
    whole = litellm.completion(messages=MESSAGES, **greedy)
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **greedy))
    joined = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert joined is not None
    assert joined.choices[0].message.content == whole.choices[0].message.content
    assert joined.usage.completion_tokens == whole.usage.completion_tokens


def test_async(greedy: dict[str, Any]) -> None:
    answer = asyncio.run(litellm.acompletion(messages=MESSAGES, **greedy))
    assert (
        answer.choices[0].message.content == litellm.completion(messages=MESSAGES, **greedy).choices[0].message.content
    )


def test_structured_output(greedy: dict[str, Any]) -> None:
    answer = litellm.completion(messages=ORDER, response_format=Order, **greedy)
    Order.model_validate_json(answer.choices[0].message.content)


def test_a_tool_loop(greedy: dict[str, Any]) -> None:
    single = {"parallel_tool_calls": False}  # else a small model goes on calling
    called = litellm.completion(messages=ORDER, tools=TOOLS, tool_choice="required", **single, **greedy).choices[0]
    assert called.finish_reason == "tool_calls"
    call = called.message.tool_calls[0]
    Order.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"ordered": True})}
    last = litellm.completion(messages=[*ORDER, called.message, result], tools=TOOLS, tool_choice="none", **greedy)
    assert last.choices[0].message.content


def test_streamed_tool_calls(greedy: dict[str, Any]) -> None:
    asked = {"messages": ORDER, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, **greedy}
    chunks = list(litellm.completion(stream=True, **asked))
    joined = litellm.stream_chunk_builder(chunks, messages=ORDER)
    assert joined is not None
    Order.model_validate_json(joined.choices[0].message.tool_calls[0].function.arguments)


def test_log_probabilities_and_several_answers(greedy: dict[str, Any]) -> None:
    answer = litellm.completion(messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, **greedy)
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_text_completion(greedy: dict[str, Any]) -> None:
    if greedy["model"].startswith("openai/"):
        greedy["model"] = "text-completion-" + greedy["model"]
    answer = litellm.text_completion(prompt="The capital of France is", **greedy)
    assert answer.choices[0].text


def test_embeddings(ask: dict[str, Any]) -> None:
    answer = litellm.embedding(input=["Paris", "Bread"], **ask)
    assert [len(each["embedding"]) for each in answer.data] == [576, 576]


def test_the_responses_api(greedy: dict[str, Any]) -> None:
    greedy["max_output_tokens"] = greedy.pop("max_tokens")
    answer = litellm.responses(input="What is the capital of France?", store=False, **greedy)
    assert answer.output[0].content[0].text


def test_errors_are_of_the_right_class(ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=MESSAGES, **{**ask, "model": "openai/nobody"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 5000}], **ask)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=MESSAGES, top_p=7, **ask)
