"""``POST /v1/messages`` through Anthropic's client: answers, events, tools, counted tokens, and errors."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic

from tests.api.live import Live, chat_text, typed_events, wait_for
from tests.tiny import CONTEXT

USER: dict[str, Any] = {"role": "user", "content": "Why?"}
GREEDY: dict[str, Any] = {
    "model": "tiny",
    "messages": [USER],
    "max_tokens": 12,
    "extra_body": {"temperature": 0, "ignore_eos": True},  # version 2 of the client has no `temperature` of its own
}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}


TOOLS: dict[str, Any] = {
    "model": "tiny",
    "tools": [WEATHER],
    "max_tokens": 300,
    "extra_body": {"temperature": 0},
}
ONE_CALL: dict[str, Any] = {"type": "any", "disable_parallel_tool_use": True}


@pytest.fixture
def sdk(live: Live) -> Iterator[Anthropic]:
    with Anthropic(base_url=str(live.http.base_url), api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def roomy_sdk(roomy: Live) -> Iterator[Anthropic]:
    with Anthropic(base_url=str(roomy.http.base_url), api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    (block,) = message.content
    assert block.type == "text"
    return str(block.text)


def raw_events(live: Live, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": [USER], "max_tokens": 40, "temperature": 0, "ignore_eos": True, **fields}
    return typed_events(live, "/v1/messages", **body)


def test_a_message_is_the_answer_of_a_chat(sdk: Anthropic, live: Live) -> None:
    assert text_of(sdk.messages.create(**GREEDY)) == chat_text(live, USER)
    told = sdk.messages.create(**GREEDY, system="Be brief.")
    assert text_of(told) == chat_text(live, {"role": "system", "content": "Be brief."}, USER)


def test_the_shape_of_a_message(sdk: Anthropic) -> None:
    message = sdk.messages.create(**GREEDY, metadata={"user_id": "me"})
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 12
    total = sdk.messages.count_tokens(model="tiny", messages=[USER]).input_tokens  # type: ignore[list-item]
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == total
    assert message.to_dict()["adapter"] == []


def test_where_the_time_went_on_request(live: Live) -> None:
    body = {"messages": [USER], "max_tokens": 3, "ignore_eos": True}
    answer = live.http.post("/v1/messages", json={**body, "explain": True, "adapter": "red"}).json()
    assert answer["explain"]["decode_ms"] > 0
    assert "explain" not in live.http.post("/v1/messages", json=body).json()
    assert raw_events(live, explain=True)[-2]["explain"].keys() == answer["explain"].keys()


def test_why_a_message_ended(sdk: Anthropic, live: Live) -> None:
    text = chat_text(live, USER, max_tokens=40)
    stop = text[10:12]
    message = sdk.messages.create(**{**GREEDY, "max_tokens": 40}, stop_sequences=["no such thing", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == text[: text.index(stop)]
    (end,) = live.service.base.eos_token_ids
    ended = sdk.messages.create(**{**GREEDY, "extra_body": {"temperature": 0, "logit_bias": {str(end): 100}}})
    assert (ended.stop_reason, ended.content) == ("end_turn", [])


@pytest.mark.parametrize("adapter", ["red", "team/blue@1"])
def test_adapters_by_model_and_by_field(sdk: Anthropic, live: Live, adapter: str) -> None:
    wanted = chat_text(live, USER, adapter=adapter)
    by_model = sdk.messages.create(**{**GREEDY, "model": adapter})
    by_field = sdk.messages.create(**{**GREEDY, "extra_body": {**GREEDY["extra_body"], "adapter": adapter}})
    assert text_of(by_model) == text_of(by_field) == wanted != chat_text(live, USER)


def test_a_conversation_goes_on_with_the_blocks_of_a_message(sdk: Anthropic, live: Live) -> None:
    first = sdk.messages.create(**GREEDY)
    turns = [USER, {"role": "assistant", "content": first.content}, USER]
    second = sdk.messages.create(**{**GREEDY, "messages": turns})
    assert text_of(second) == chat_text(live, USER, {"role": "assistant", "content": text_of(first)}, USER)


def test_the_sdks_stream_adds_up_to_the_whole_message(sdk: Anthropic) -> None:
    whole = sdk.messages.create(**GREEDY)
    with sdk.messages.stream(**GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(whole) == text_of(final)
    same = ("model", "role", "stop_reason", "stop_sequence", "type")
    assert [getattr(final, name) for name in same] == [getattr(whole, name) for name in same]
    assert final.usage.output_tokens == 12


def test_events_in_their_order(live: Live) -> None:
    events = raw_events(live)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert len(kinds) > 15, "all at once is no stream"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["output_tokens"] == 0
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 40
    text = "".join(event["delta"]["text"] for event in events[3:-3])
    assert text == chat_text(live, USER, max_tokens=40)


def test_count_tokens_needs_no_max_tokens(sdk: Anthropic, roomy_sdk: Anthropic, live: Live) -> None:
    counted = sdk.messages.count_tokens(model="tiny", messages=[USER], system="Be brief.").input_tokens  # type: ignore[list-item]
    messages = [{"role": "system", "content": "Be brief."}, USER]
    assert counted == live.http.post("/tokenize", json={"messages": messages}).json()["count"]
    more = roomy_sdk.messages.count_tokens(model="tiny", messages=[USER], tools=[WEATHER])  # type: ignore[list-item]
    assert more.input_tokens > 100


def test_errors_are_anthropics(sdk: Anthropic, live: Live) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        sdk.messages.create(**{**GREEDY, "model": "nobody"})
    assert unknown.value.body["type"] == "error"  # type: ignore[index]
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError) as long:
        sdk.messages.create(**{**GREEDY, "messages": [{"role": "user", "content": "x" * CONTEXT}]})
    assert long.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert "maximum context length" in str(long.value)
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.count_tokens(model="nobody", messages=[USER])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "tex": 1}]}]},
            400,
            "Unknown field `messages.0.content.0.tex`; did you mean `messages.0.content.0.text`?",
        ),
        ({"messages": [USER]}, 400, "max_tokens"),
        ({"max_tokens": 5}, 400, "messages"),
        ({"max_tokens": 5, "messages": [USER], "n": 2}, 400, "Unknown field"),
        ({"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "image"),
        ("{", 400, "JSON"),
    ],
    ids=str,
)
def test_what_is_refused(live: Live, body: Any, status: int, words: str) -> None:
    sent = {"content": body} if isinstance(body, str) else {"json": body}
    response = live.http.post("/v1/messages", headers={"anthropic-version": "2023-06-01"}, **sent)
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert words in answer["error"]["message"]
    assert response.headers["x-request-id"]


def test_a_body_that_is_too_large(live: Live) -> None:
    response = live.http.post("/v1/messages", json={"messages": [{"role": "user", "content": "x" * 300_000}]})
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "request_too_large"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(live: Live, stream: bool) -> None:
    body = {"messages": [USER], "max_tokens": 200, "stream": stream, "ignore_eos": True, "adapter": "red"}
    if stream:
        with live.http.stream("POST", "/v1/messages", json=body) as response:
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            live.http.post("/v1/messages", json=body, timeout=0.05)
    wait_for(live.idle)


# --- tools: grammars make a random model call them in shape


def test_a_tool_that_must_be_called(roomy_sdk: Anthropic) -> None:
    for choice in ONE_CALL, {**ONE_CALL, "type": "tool", "name": "weather"}:
        message = roomy_sdk.messages.create(messages=[USER], tool_choice=choice, **TOOLS)
        (call,) = [block for block in message.content if block.type == "tool_use"]
        assert call.name == "weather"
        assert call.input["unit"] in ("C", "F")  # type: ignore[index]
        assert message.stop_reason == "tool_use"


def test_a_tool_loop(roomy_sdk: Anthropic) -> None:
    first = roomy_sdk.messages.create(messages=[USER], tool_choice=ONE_CALL, **TOOLS)
    (call,) = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "cold"}
    turns = [USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = roomy_sdk.messages.create(messages=turns, **TOOLS)
    before, after = (each.usage.input_tokens + (each.usage.cache_read_input_tokens or 0) for each in (first, second))
    assert after > before


def test_the_stream_of_a_call(roomy_sdk: Anthropic) -> None:
    ask: dict[str, Any] = {"messages": [USER], "tool_choice": ONE_CALL, **TOOLS}
    whole = roomy_sdk.messages.create(**ask)
    with roomy_sdk.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == [block.type for block in whole.content]
    assert final.content[-1].input == whole.content[-1].input  # type: ignore[union-attr]
    assert final.stop_reason == "tool_use"
