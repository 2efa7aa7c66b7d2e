"""Fields that clients send with default values, and responses that they send back as messages."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from server.text.chat_template import TemplateSources
from server.text.codec import Codec
from server.text.conversation import Conversation
from server.text.template_environment import render
from tests.api.live import Live, request
from tests.encoding import encode_chat
from tests.tiny import VOCABULARY, tiny_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION: dict[str, Any] = {"role": "user", "content": "Why?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "So."}

NOTHING: list[dict[str, Any]] = [
    {"n": None, "stop": None, "seed": None, "user": None, "logit_bias": None, "stream": None, "stream_options": None},
    {"temperature": 0, "top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "user": ""},
    {"n": 1, "stop": [], "logprobs": False, "stream": False, "stream_options": {}, "tools": None, "functions": None},
    {"tools": [], "tool_choice": None, "parallel_tool_calls": True, "response_format": None, "adapter": None},
    {"tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
    {"stream_options": {"include_usage": None, "continuous_usage_stats": None, "include_obfuscation": None}},
    {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "x"},
    {"cache_control": {"type": "ephemeral"}, "guided_json": None, "chat_template_kwargs": {}, "extra_body": {}},
    {"thinking": None, "reasoning_effort": None, "top_logprobs": None, "logprobs": None, "min_tokens": None},
]
WHOLE: list[dict[str, Any]] = [{"max_tokens": 12.0, "n": 1.0, "top_k": 0.0, "seed": 5.0, "top_logprobs": 0.0}]
OF_CHAT: list[dict[str, Any]] = [
    {"max_completion_tokens": None, "top_logprobs": 0},
    {"max_completion_tokens": 12, "max_tokens": None},
    {"max_completion_tokens": 12, "max_tokens": 12},
]
OF_COMPLETIONS: list[dict[str, Any]] = [
    {"best_of": 1, "echo": False, "suffix": "", "logprobs": None},
    {"best_of": None, "echo": None, "suffix": None},
]

TURNS: list[dict[str, Any]] = [
    # response messages as openai-python, LiteLLM, vLLM and SGLang dump them
    {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
    {"provider_specific_fields": {"refusal": None}, "thinking_blocks": [], "images": [], "reasoning_content": ""},
    {"reasoning": None, "reasoning_content": None, "tool_calls": [], "stop_reason": None, "token_ids": None},
    # OpenRouter, Open WebUI, the items of OpenAI's Responses API
    {"reasoning": "", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
    {"id": "msg_1", "status": "completed", "type": "message", "annotations": [{"type": "url_citation"}]},
    {"timestamp": 1764374478, "metadata": {"model": "x"}, "cache_control": {"type": "ephemeral"}},
    {"name": None, "tool_call_id": None},
    {"name": "", "tool_call_id": "", "refusal": "", "function_call": {}},
]
PARTS: list[dict[str, Any]] = [
    {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    {"cache_control": None, "annotations": [], "id": "part_1", "index": 0},
    {"citations": None, "logprobs": []},
]


@pytest.fixture
def sdk(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def answered(live: Live, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    response = live.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


@pytest.mark.parametrize("fields", [*NOTHING, *WHOLE, *OF_CHAT], ids=str)
def test_minimal_chat_request(live: Live, fields: dict[str, Any]) -> None:
    assert answered(live, [QUESTION], **fields) == answered(live, [QUESTION])


@pytest.mark.parametrize("fields", [*NOTHING, *WHOLE, *OF_COMPLETIONS], ids=str)
def test_minimal_completion_request(live: Live, fields: dict[str, Any]) -> None:
    assert live.text(**fields) == live.text()


@pytest.mark.parametrize("fields", TURNS, ids=str)
def test_assistant_message_with_all_fields_can_be_sent_back(live: Live, fields: dict[str, Any]) -> None:
    plain = answered(live, [QUESTION, ANSWER, QUESTION])
    assert answered(live, [QUESTION, {**ANSWER, **fields}, QUESTION]) == plain
    if "name" not in fields:
        assert answered(live, [{**QUESTION, **fields}, ANSWER, QUESTION]) == plain


@pytest.mark.parametrize("fields", PARTS, ids=str)
def test_a_text_part_with_all_its_fields(live: Live, fields: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "Wh", **fields}, {"type": "text", "text": "y?"}]
    assert answered(live, [{"role": "user", "content": parts}]) == answered(live, [QUESTION])


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": []}], ids=str)
def test_assistant_message_without_content(live: Live, content: dict[str, Any]) -> None:
    empty = answered(live, [QUESTION, {"role": "assistant", "content": ""}, QUESTION])
    assert answered(live, [QUESTION, {"role": "assistant", **content}, QUESTION]) == empty
    body = {"messages": [QUESTION, {"role": "assistant", **content}, QUESTION]}
    assert live.http.post("/tokenize", json=body).json()["tokens"] == tokens([QUESTION, {**ANSWER, "content": ""}])


def test_what_parse_of_the_sdk_adds_can_be_sent_back(live: Live) -> None:
    function = {"name": "look_up", "arguments": '{"a": 1}'}

    def turns(**fields: Any) -> list[dict[str, Any]]:
        call = {"id": "call_1", "type": "function", "function": {**function, **fields}}
        parsed = {"parsed": fields} if fields else {}
        return [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call], **parsed},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        ]

    assert answered(live, turns(parsed_arguments={"a": 1})) == answered(live, turns())


def tokens(turns: list[dict[str, Any]]) -> list[int]:
    return encode_chat(Codec(tiny_tokenizer(), VOCABULARY), Conversation([*turns, QUESTION]))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_passed_to_a_template_that_uses_it(
    live: Live, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing = "{% for m in messages %}{{ m.reasoning_content or '' }}|{{ m.content }};{% endfor %}"
    turns = [QUESTION, {**ANSWER, field: "Because."}]
    plain = live.http.post("/tokenize", json={"messages": turns}).json()["tokens"]
    assert plain == live.http.post("/tokenize", json={"messages": [QUESTION, ANSWER]}).json()["tokens"]
    codec = live.service.codec
    monkeypatch.setattr(codec, "template", codec.make_template(TemplateSources(knowing), render))
    known = live.http.post("/tokenize", json={"messages": turns}).json()["tokens"]
    assert live.http.post("/detokenize", json={"tokens": known}).json() == {"prompt": "|Why?;Because.|So.;"}


@pytest.mark.parametrize("top_p", [0, 0.0, 1e-300])
def test_top_p_of_0_is_greedy(live: Live, top_p: float) -> None:
    hot = {"temperature": 2, "seed": 1}
    assert live.text(top_p=top_p, **hot) == live.text()
    assert live.text(**hot) != live.text()
    penalised = {"presence_penalty": 2, "frequency_penalty": 2, "logit_bias": {"65": 3}}
    assert live.text(top_p=top_p, **hot, **penalised) == live.text(**penalised)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("options", [{"include_usage": True}, {}], ids=str)
def test_usage_in_every_chunk(live: Live, path: str, options: dict[str, Any]) -> None:
    asked = {"messages": [QUESTION]} if path == CHAT else {"prompt": "Once"}
    body = {**asked, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    whole = live.http.post(path, json=body).json()["usage"]
    chunks = live.stream(path, **body, stream_options={**options, "continuous_usage_stats": True})
    usages = [chunk["usage"] for chunk in chunks]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert len(set(counts)) > 5, "they grow as tokens come"
    assert (counts[0] == 0) == (path == CHAT), "a role comes before any token"
    assert all(u["prompt_tokens"] == whole["prompt_tokens"] for u in usages)
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)
    assert usages[-1] == usages[-2] == {**whole, "prompt_tokens_details": usages[-1]["prompt_tokens_details"]}
    assert chunks[-1]["choices"] == []
    assert all(chunk["choices"] for chunk in chunks[:-1])


def test_the_same_text_with_usage_in_every_chunk(live: Live) -> None:
    def text(**options: Any) -> str:
        chunks = live.stream(**request(max_tokens=40), stream_options=options)
        return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])

    assert text(continuous_usage_stats=True) == text() == live.text(max_tokens=40)


# --- through OpenAI's own client


def test_the_sdk_sends_a_conversation_back(sdk: OpenAI) -> None:
    """A response message of the client library can be a message of the next request."""
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    first = sdk.chat.completions.create(messages=[QUESTION], **ask).choices[0].message
    for turn in (first, first.model_dump(), first.to_dict(), {**first.model_dump(), "content": None}):
        second = sdk.chat.completions.create(messages=[QUESTION, turn, QUESTION], **ask)
        assert second.usage is not None
        assert second.usage.completion_tokens > 0


def test_sdk_with_all_fields_set_to_null(sdk: OpenAI) -> None:
    completion = sdk.chat.completions.create(
        model="tiny", messages=[QUESTION], max_tokens=None, max_completion_tokens=4, n=None, stop=None, seed=None,
        logit_bias=None, logprobs=None, top_logprobs=None, top_p=0, temperature=None, frequency_penalty=None,
        presence_penalty=None, metadata=None, reasoning_effort=None, service_tier=None, store=None, stream=None,
        stream_options=None, verbosity=None, modalities=None, prediction=None, audio=None, user="", tools=[],
        functions=[], parallel_tool_calls=False, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4
    text = sdk.completions.create(
        model="tiny", prompt="Once", best_of=None, echo=False, suffix=None, logprobs=None, n=1, stop=[], max_tokens=4,
        top_p=0, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert text.usage is not None
    assert text.usage.completion_tokens == 4


def test_the_sdk_reads_usage_from_every_chunk(sdk: OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="tiny", messages=[QUESTION], max_tokens=6, stream=True, temperature=0,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts[0] == 0
    assert counts[-1] == 6
