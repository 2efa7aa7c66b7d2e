"""Bad input: a clear error in OpenAI's shape, nothing changed, and the next request works."""

import json
from typing import Any

import httpx
import pytest

from adapters.errors import AdapterError
from server.api.http.errors import STATUS
from server.api.schemas.generation import MAX_STOP_LENGTH, MAX_USER_LENGTH
from tests.api.live import Live, request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
FUNCTION = {"type": "function", "function": {"name": "f"}}
MIX_17 = [{"name": "red", "weight": 0.1}] * 17


def called(arguments: str) -> dict[str, Any]:
    """A call of a tool in a message."""
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [0]}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 0.009}, "repetition_penalty"),
    ({"logit_bias": {str(token): 1 for token in range(4097)}}, "logit_bias"),
    ({"x" * 1000: 1}, "x" * 80),
    ({str(field): 1 for field in range(10_000)}, "0"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"264": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a", 1]}, "stop.1"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream_options": {"more": True}}, "stream_options.more"),
    ({"stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"speculation": "off"}, "speculation"),
    ({"user": 5}, "user"),
    ({"user": "x" * 1025}, "user"),
    ({"model": 5}, "model"),
    ({"model": "x" * 1000}, "model"),
    ({"adapter": 5}, "adapter"),
    ({"adapter": {"name": "red"}}, "adapter"),
    ({"adapter": ["red"]}, "adapter.0"),
    ({"adapter": [{"weight": 1}]}, "adapter.0.name"),
    ({"adapter": [{"name": "red", "wieght": 1}]}, "adapter.0.wieght"),
    ({"adapter": [{"name": "red", "weight": 101}]}, "adapter.0.weight"),
    ({"adapter": [{"name": "red", "weight": "1"}]}, "adapter.0.weight"),
    ({"adapter": [{"name": "red", "weight": None}]}, "adapter.0.weight"),
    ({"adapter": MIX_17}, "adapter"),
    ({"model": "red", "adapter": "green"}, "adapter"),
    ({"model": "red", "adapter": []}, "adapter"),
    ({"model": "red", "adapter": [{"name": "red"}, {"name": "green"}]}, "adapter"),
    ({"n": 10**6}, "n"),
    ({"n": "1"}, "n"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tools": {"type": "function"}}, "tools"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"no_such_field": False}, "no_such_field"),
    ({"": 1}, ""),
]
OF_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "x"}, "suffix"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [264]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1], [264]]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"suffix": "x"}, "suffix"),
    ({"suffix": 5}, "suffix"),
    ({"suffix": "x", "echo": True}, "echo"),
]
OF_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5] * 4097}, "messages"),
    ({"messages": [5] * 4096}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "system"}, *HI]}, "messages.0.content"),
    ({"messages": [*HI, {"role": "assistant", "content": 5}]}, "messages.1.content"),
    ({"messages": [{"role": "critic", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]}]},
        "messages.0.content.colour",
    ),
    (
        {"messages": [*HI, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "messages.1.tool_calls.0.function",
    ),
    (
        {"messages": [*HI, {"role": "assistant", "tool_calls": [called('{"a": ' + "[" * 900 + "]" * 900 + "}")]}]},
        "messages.1.tool_calls.0.function.arguments",
    ),
    ({"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools.0.function.parameters"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
]


def refused(live: Live, response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    """Return the error; assert its format, and that the server still works."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    place = {"file", "tensor"} if error["code"] in ("adapter_rejected", "base_mismatch", "unknown_fields") else set()
    assert set(error) == {"message", "type", "param", "code"} | place
    assert error["param"] == (param or None), error
    assert len(error["message"]) > 10
    assert live.complete(max_tokens=1)["usage"]["completion_tokens"] == 1
    return error


@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=lambda value: str(value)[:50])
def test_fields_of_both(live: Live, fields: dict[str, Any], param: str) -> None:
    refused(live, live.http.post(COMPLETIONS, json=request(**fields)), 400, param)
    refused(live, live.http.post(CHAT, json={"messages": HI, **fields}), 400, param)


@pytest.mark.parametrize(("fields", "param"), OF_COMPLETIONS, ids=lambda value: str(value)[:50])
def test_fields_of_completions(live: Live, fields: dict[str, Any], param: str) -> None:
    refused(live, live.http.post(COMPLETIONS, json=request(**fields)), 400, param)


@pytest.mark.parametrize(("fields", "param"), OF_CHAT, ids=lambda value: str(value)[:50])
def test_fields_of_chat(live: Live, fields: dict[str, Any], param: str) -> None:
    refused(live, live.http.post(CHAT, json={"messages": HI, **fields}), 400, param)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [FUNCTION], "tool_choice": {**FUNCTION, "function": {"name": "g"}}}, "tool_choice"),
        (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "x"}, "messages"),
        ("/tokenize", {"add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_a_contradiction_is_no_missing_support(live: Live, path: str, fields: dict[str, Any], param: str) -> None:
    """Clients drop a parameter that is not supported, and try again."""
    error = refused(live, live.http.post(path, json={"messages": HI, **fields}), 400, param)
    assert error["code"] is None


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "adapter"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_nan_and_infinity_are_refused(live: Live, field: str, number: str) -> None:
    value = f'[{{"name": "red", "weight": {number}}}]' if field == "adapter" else number
    body = f'{{"prompt": "x", "{field}": {value}}}'
    response = live.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    error = refused(live, response, 400, "adapter.0.weight" if field == "adapter" else field)
    assert "finite" in error["message"]


@pytest.mark.parametrize(
    ("body", "about"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x",}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[" * 100_000, ""),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", ""),
        (b"[]", "JSON object"),
        (b'"prompt"', "JSON object"),
        (b"null", ""),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_bodies(live: Live, body: bytes, about: str) -> None:
    for path in (COMPLETIONS, CHAT):
        response = live.http.post(path, content=body, headers={"content-type": "application/json"})
        assert about in refused(live, response, 400, None)["message"]


def test_a_forgotten_content_type_is_named(live: Live) -> None:
    body = json.dumps(request())
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        error = refused(live, live.http.post(COMPLETIONS, content=body, headers=headers), 400, None)
        assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize("field", ["prompt", "model", "adapter", "stop"])
def test_lone_surrogate(live: Live, field: str) -> None:
    body = json.dumps(request(**{field: "\ud800"}))
    response = live.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    param = {"stop": "stop.0", "adapter": "adapter.0.name"}.get(field, field)
    refused(live, response, 400, param)
    unknown = live.http.post(COMPLETIONS, content=b'{"\\ud800": 1}', headers={"content-type": "application/json"})
    assert unknown.status_code == 400
    part = b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "\\ud800": 1}]}]}'
    unknown = live.http.post(CHAT, content=part, headers={"content-type": "application/json"})
    refused(live, unknown, 400, "messages.0.content.\\ud800")


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_longer_than_the_context(live: Live, stream: bool) -> None:
    long = "x" * 300
    for path, fields, param in [
        (COMPLETIONS, {"prompt": long}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 256}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**9}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**30}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": long}]}, "messages"),
        (CHAT, {"messages": HI, "max_tokens": 10**9}, "messages"),
    ]:
        error = refused(live, live.http.post(path, json={**fields, "stream": stream}), 400, param)
        assert error["message"].startswith("This model's maximum context length is 256 tokens.")
        assert error["code"] == "context_length_exceeded"


def test_a_text_too_long_for_any_tokens_is_not_encoded(live: Live) -> None:
    long = "x" * 20_000
    error = refused(live, live.http.post(COMPLETIONS, json={"prompt": long}), 400, "prompt")
    assert error["message"].startswith("This model's maximum context length is 256 tokens. However, your prompt has")
    assert error["code"] == "context_length_exceeded"


def test_a_body_larger_than_allowed(live: Live) -> None:
    long = json.dumps({"prompt": "x" * 300_000}).encode()
    for content in (long, iter([long[:100_000], long[100_000:]])):
        response = live.http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        assert "too large" in refused(live, response, 413, None)["message"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "nobody"}, "model", "model_not_found"),
        ({"model": "nobody", "adapter": "red"}, "model", "model_not_found"),
        ({"model": "../red"}, "model", "model_not_found"),
        ({"adapter": "nobody"}, "adapter", "adapter_not_found"),
        ({"adapter": ""}, "adapter", "adapter_not_found"),
        ({"model": "red@2"}, "model", "model_not_found"),
        ({"model": "red@"}, "model", "model_not_found"),
        ({"adapter": "red@2"}, "adapter", "adapter_not_found"),
        ({"adapter": "red@01"}, "adapter", "adapter_not_found"),
        ({"adapter": "red@1@1"}, "adapter", "adapter_not_found"),
        ({"adapter": "@1"}, "adapter", "adapter_not_found"),
        ({"adapter": "Red"}, "adapter", "adapter_not_found"),
        ({"adapter": "tiny"}, "adapter", "adapter_not_found"),
        ({"adapter": [{"name": "red"}, {"name": "nobody"}]}, "adapter", "adapter_not_found"),
        ({"adapter": [{"name": "nobody", "weight": 0}]}, "adapter", "adapter_not_found"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_unknown_names(live: Live, fields: dict[str, Any], param: str, code: str, stream: bool) -> None:
    error = refused(live, live.http.post(COMPLETIONS, json=request(**fields, stream=stream)), 404, param)
    assert error["code"] == code


@pytest.mark.parametrize("stop", [[""], ["a", ""]], ids=str)
def test_an_empty_stop_string_is_refused_with_the_reason(live: Live, stop: Any) -> None:
    error = refused(live, live.http.post(COMPLETIONS, json=request(stop=stop)), 400, "stop")
    assert error["message"] == "an empty stop string would end every answer before it begins; leave it out (in `stop`)."


@pytest.mark.parametrize(
    ("field", "most"), [("model", 256), ("adapter", 256), ("user", MAX_USER_LENGTH), ("stop", MAX_STOP_LENGTH)]
)
def test_length_of_a_too_long_text_is_in_characters(live: Live, field: str, most: int) -> None:
    error = live.http.post("/v1/completions", json=request(**{field: "x" * (most + 1)})).json()["error"]
    assert f"at most {most} characters" in error["message"]


def test_empty_name_has_its_own_message(live: Live) -> None:
    for response, param in [
        (live.http.post(COMPLETIONS, json=request(model="")), "model"),
        (live.http.post(COMPLETIONS, json=request(adapter="")), "adapter"),
    ]:
        message = refused(live, response, 404, param)["message"]
        assert "is empty" in message
        assert "``" not in message


def test_every_error_about_adapters_has_a_status() -> None:
    left = [AdapterError]
    while left:
        error = left.pop()
        left += error.__subclasses__()
        assert (error in STATUS) == (error is not AdapterError), error


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completion", 404),
        ("GET", COMPLETIONS, 405),
        ("PUT", "/v1/adapters", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/adapters/nobody", 404),
        ("DELETE", "/v1/adapters/nobody", 404),
        ("GET", "/v1/adapters/red@2", 404),
        ("DELETE", "/v1/adapters/red@2", 404),
        ("GET", "/v1/aliases/nobody", 404),
        ("DELETE", "/v1/aliases/nobody", 404),
        ("POST", "/v1/aliases/nobody", 405),
        ("GET", "/v1/adapters?limit=0", 400),
        ("GET", "/v1/models?after=x@y", 400),
        ("GET", "/v1/models?limit=0", 400),
        ("GET", "/v1/models?limit=x", 400),
    ],
)
def test_routes_and_methods(live: Live, method: str, path: str, status: int) -> None:
    response = live.http.request(method, path)
    params = {"limit=": "limit", "after=": "after", "/models/": "model", "/nobody": "adapter", "@2": "adapter"}
    param = next((param for part, param in params.items() if part in path), None)
    refused(live, response, status, None if status == 405 else param)
