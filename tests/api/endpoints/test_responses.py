"""``POST /v1/responses`` through OpenAI's client: answers, typed events, tools, structured text, and errors."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from tests.api.live import Live, chat_text, typed_events, wait_for
from tests.tiny import CONTEXT

QUESTION = "Why?"
GREEDY: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0,
    "max_output_tokens": 12,
    "extra_body": {"ignore_eos": True},
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
    "strict": True,
}


ONE_CALL: dict[str, Any] = {
    "tools": [WEATHER],
    "parallel_tool_calls": False,
    "temperature": 0,
    "max_output_tokens": 300,
}


@pytest.fixture
def sdk(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def roomy_sdk(roomy: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{roomy.http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def raw_events(live: Live, **fields: Any) -> list[dict[str, Any]]:
    body = {"input": QUESTION, "max_output_tokens": 40, "temperature": 0, "ignore_eos": True, **fields}
    return typed_events(live, "/v1/responses", **body)


def without_ids(response: Response) -> dict[str, Any]:
    found = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        found.pop(name, None)
    for item in found["output"]:  # type: ignore[attr-defined]
        item.pop("id")
        for part in item.get("content", ()):
            part.pop("parsed", None)  # the client's own, for structured text
    found["usage"].pop("input_tokens_details")  # type: ignore[attr-defined]
    return found


def test_a_response_is_the_answer_of_a_chat(sdk: OpenAI, live: Live) -> None:
    user = {"role": "user", "content": QUESTION}
    assert sdk.responses.create(input=QUESTION, **GREEDY).output_text == chat_text(live, user)
    assert sdk.responses.create(input=[user], **GREEDY).output_text == chat_text(live, user)  # type: ignore[list-item]
    told = sdk.responses.create(input=QUESTION, instructions="Be brief.", **GREEDY)
    assert told.output_text == chat_text(live, {"role": "system", "content": "Be brief."}, user)
    assert told.instructions == "Be brief."


def test_the_shape_of_a_response(sdk: OpenAI) -> None:
    response = sdk.responses.create(input=QUESTION, metadata={"a": "b"}, user="me", store=False, **GREEDY)
    assert response.id.startswith("resp_")
    assert response.object == "response"
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.metadata == {"a": "b"}
    assert response.model == "tiny"
    assert response.max_output_tokens == 12
    assert response.error is None
    assert response.usage is not None
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == response.usage.input_tokens + 12
    (message,) = response.output
    assert message.type == "message"
    assert message.role == "assistant"
    assert message.id.startswith("msg_")
    assert response.to_dict()["adapter"] == []


def test_where_the_time_went_on_request(live: Live) -> None:
    body = {"input": QUESTION, "max_output_tokens": 3, "ignore_eos": True}
    answer = live.http.post("/v1/responses", json={**body, "explain": True, "adapter": "red"}).json()
    assert answer["explain"]["decode_ms"] > 0
    assert "explain" not in live.http.post("/v1/responses", json=body).json()
    events = raw_events(live, explain=True)
    assert "explain" not in events[0]["response"]
    assert events[-1]["response"]["explain"].keys() == answer["explain"].keys()


def test_an_end_token_completes_a_response(sdk: OpenAI, live: Live) -> None:
    (end,) = live.service.base.eos_token_ids
    response = sdk.responses.create(
        input=QUESTION, **{**GREEDY, "extra_body": {"logit_bias": {str(end): 100}, "ignore_eos": False}}
    )
    assert (response.status, response.incomplete_details, response.output_text) == ("completed", None, "")


@pytest.mark.parametrize("adapter", ["red", "team/blue@1"])
def test_adapters_by_model_and_by_field(sdk: OpenAI, live: Live, adapter: str) -> None:
    wanted = chat_text(live, {"role": "user", "content": QUESTION}, adapter=adapter)
    assert wanted != chat_text(live, {"role": "user", "content": QUESTION})
    by_model = sdk.responses.create(input=QUESTION, **{**GREEDY, "model": adapter})
    by_field = sdk.responses.create(
        input=QUESTION, **{**GREEDY, "extra_body": {"ignore_eos": True, "adapter": adapter}}
    )
    assert by_model.output_text == by_field.output_text == wanted
    assert by_field.to_dict()["adapter"][0]["name"].startswith(adapter.partition("@")[0])  # type: ignore[index]


def test_a_conversation_goes_on_with_the_items_of_a_response(sdk: OpenAI, live: Live) -> None:
    first = sdk.responses.create(input=QUESTION, **GREEDY)
    user = {"role": "user", "content": QUESTION}
    items = [user, *(item.to_dict() for item in first.output), user]
    second = sdk.responses.create(input=items, **GREEDY)  # type: ignore[arg-type]
    assert second.output_text == chat_text(live, user, {"role": "assistant", "content": first.output_text}, user)


def test_the_sdks_stream_adds_up_to_the_whole_response(sdk: OpenAI, live: Live) -> None:
    text = chat_text(live, {"role": "user", "content": QUESTION}, max_tokens=40)
    ask = {**GREEDY, "max_output_tokens": 40, "extra_body": {"ignore_eos": True, "stop": text[20:22]}}
    whole = sdk.responses.create(input=QUESTION, **ask)
    assert whole.status == "completed", "the client takes no other for final"
    with sdk.responses.stream(input=QUESTION, **ask) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == whole.output_text
    assert without_ids(final) == without_ids(whole)


def test_events_in_their_order(live: Live) -> None:
    events = raw_events(live)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert len(kinds) > 15, "all at once is no stream"
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    text = "".join(event["delta"] for event in events if "delta" in event)
    assert text == events[-4]["text"] == events[-1]["response"]["output"][0]["content"][0]["text"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["usage"] is None
    assert events[-1]["response"]["usage"]["output_tokens"] == 40
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]


def test_the_streams_of_many_prompts_are_their_whole_answers(live: Live) -> None:
    for index, prompt in enumerate(["naïve 🙂", "日本語", "Ünïcödé ♞", "x" * 99]):
        adapter = [None, "red", "green", "team/blue"][index]
        more = {"adapter": adapter} if adapter else {}
        wanted = chat_text(live, {"role": "user", "content": prompt}, max_tokens=40, **more)
        events = raw_events(live, input=prompt, **more)
        assert "".join(event["delta"] for event in events if "delta" in event) == wanted


def test_errors_are_openais(sdk: OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="keeps no responses") as stored:
        sdk.responses.create(input=QUESTION, store=True, **GREEDY)
    assert (stored.value.param, stored.value.code) == ("store", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.responses.create(input=QUESTION, **{**GREEDY, "model": "nobody"})
    assert unknown.value.param == "model"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            sdk.responses.create(input="x" * CONTEXT, stream=stream, **GREEDY)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError) as sampling:
        sdk.responses.create(input=QUESTION, **{**GREEDY, "temperature": 3})
    assert sampling.value.param == "temperature"
    assert live.http.get("/v1/responses/resp_1").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(live: Live, stream: bool) -> None:
    body = {"input": QUESTION, "stream": stream, "ignore_eos": True, "adapter": "red"}
    before = live.sampled()
    if stream:
        with live.http.stream("POST", "/v1/responses", json=body) as response:
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            live.http.post("/v1/responses", json=body, timeout=0.05)
    wait_for(live.idle)
    assert live.sampled() - before < CONTEXT


LOGPROBS: list[Any] = ["message.output_text.logprobs"]


def test_log_probabilities_are_those_of_a_chat(sdk: OpenAI, live: Live) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    chat = live.http.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2}).json()
    response = sdk.responses.create(input=QUESTION, include=LOGPROBS, top_logprobs=2, **GREEDY)
    part = response.to_dict()["output"][0]["content"][0]  # type: ignore[index]
    assert part["logprobs"] == chat["choices"][0]["logprobs"]["content"]
    data = b"".join(bytes(each["bytes"]) for each in part["logprobs"])
    assert data.decode(errors="replace") == part["text"]
    assert response.top_logprobs == 2
    plain = sdk.responses.create(input=QUESTION, **GREEDY).to_dict()
    assert plain["output"][0]["content"][0]["logprobs"] == []  # type: ignore[index]


def test_the_stream_of_log_probabilities(live: Live) -> None:
    events = raw_events(live, include=LOGPROBS, top_logprobs=1)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    each = [entry for delta in deltas for entry in delta["logprobs"]]
    assert each == events[-4]["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert len(each) == 40
    assert all(len(entry["top_logprobs"]) == 1 for entry in each)


# --- tools and structured text: grammars make a random model answer in shape


def test_a_tool_that_must_be_called(roomy_sdk: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "input": QUESTION, **ONE_CALL}
    for choice in ("required", {"type": "function", "name": "weather"}):
        response = roomy_sdk.responses.create(**ask, tool_choice=choice)
        (call,) = [item for item in response.output if item.type == "function_call"]
        assert call.name == "weather"
        assert json.loads(call.arguments)["unit"] in ("C", "F")
        assert call.call_id
        assert response.status == "completed"


def test_a_tool_loop(roomy_sdk: OpenAI) -> None:
    user = {"role": "user", "content": QUESTION}
    ask: dict[str, Any] = {"model": "tiny", **ONE_CALL}
    first = roomy_sdk.responses.create(input=[user], tool_choice="required", **ask)  # type: ignore[list-item]
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "cold"}
    items = [user, *(item.to_dict() for item in first.output), result]
    second = roomy_sdk.responses.create(input=items, **ask)  # type: ignore[arg-type]
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_the_stream_of_a_call(roomy: Live, roomy_sdk: OpenAI) -> None:
    events = raw_events(roomy, tool_choice="required", ignore_eos=False, **ONE_CALL)
    kinds = [event["type"].removeprefix("response.") for event in events]
    first = kinds.index("function_call_arguments.delta")
    assert events[first - 1]["item"]["name"] == "weather"
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    arguments = "".join(e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta")
    assert arguments == events[-3]["arguments"]
    assert json.loads(arguments)["unit"] in ("C", "F")
    with roomy_sdk.responses.stream(model="tiny", input=QUESTION, tool_choice="required", **ONE_CALL) as stream:
        final = stream.get_final_response()
    assert final.output[-1].type == "function_call"
    assert final.output[-1].arguments == arguments


class Verdict(BaseModel):
    guilty: bool
    years: int


def test_parse_returns_an_object(roomy_sdk: OpenAI) -> None:
    response = roomy_sdk.responses.parse(
        model="tiny",
        input=QUESTION,
        text_format=Verdict,
        max_output_tokens=200,
        extra_body={"adapter": "red", "seed": 1},
    )
    if response.status == "completed":
        assert isinstance(response.output_parsed, Verdict)
    else:
        assert response.output_text.startswith("{")
