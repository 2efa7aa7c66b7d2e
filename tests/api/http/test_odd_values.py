"""Odd values in every field, also inside objects: an answer or an error of the usual shape, never a 500."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from server.api.schemas.anthropic.requests import MessagesRequest
from server.api.schemas.base import TolerantSchema
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completion import CompletionRequest
from server.api.schemas.embeddings import EmbeddingRequest
from server.api.schemas.messages import Message
from server.api.schemas.responses_api.requests import ResponsesRequest
from server.api.schemas.score import ScoreRequest
from tests.api.live import Live

CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e300, 10**30, -(10**400), 1.5, 5e-324),
    *("", "x", "\ud800", "\0", "(", "a" * 5000),
    *([], [[]], [None], ["x"], [1.5], [True], [10**30], [{}], [{"type": "function"}]),
    *({}, {"": None}, {"type": "x"}, {"a": {"b": [1]}}, {"\ud800": 1}, {"1": 10**400}, {"$ref": "#"}),
)
SCHEMAS: Mapping[str, tuple[type[TolerantSchema], Mapping[str, Any]]] = {
    CHAT: (ChatRequest, {"messages": [HI], "max_tokens": 2}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi", "max_tokens": 2}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "hi"}),
    "/v1/responses": (ResponsesRequest, {"input": "hi", "max_output_tokens": 2}),
    "/v1/messages": (MessagesRequest, {"messages": [HI], "max_tokens": 2}),
    "/v1/score": (ScoreRequest, {"prompt": "a", "continuations": ["b"]}),
}


def fields(schema: type[TolerantSchema]) -> list[str]:
    return [*schema.model_fields, *schema.unsupported, *schema.harmless, "unknown"]


def bodies(path: str) -> Iterator[dict[str, Any]]:
    schema, plain = SCHEMAS[path]
    for field in fields(schema):
        yield from ({**plain, field: odd} for odd in ODD[::2])


def nested(odd: Any) -> Iterator[dict[str, Any]]:
    """Yield the fields of chats with a value inside."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": odd}}}
    yield {"tools": [{"type": "function", "function": odd}]}
    yield {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    yield {"tool_choice": {"type": "function", "function": odd}}
    for schema in (odd, {"schema": odd}, {"schema": {"type": "object", "properties": {"a": odd}}}):
        yield {"response_format": {"type": "json_schema", "json_schema": schema}}
    yield from ({"structured_outputs": {kind: odd}} for kind in ("json", "regex", "choice", "grammar", "json_object"))
    yield {"stream_options": {"include_usage": odd}, "stream": True}
    yield from ({"documents": [odd]}, {"chat_template_kwargs": {"a": odd}}, {"logit_bias": {"1": odd}})
    yield from ({"adapter": [odd]}, {"adapter": [{"name": odd}]}, {"stop": [odd]})
    yield from ({"messages": [{**HI, field: odd}]} for field in fields(Message))
    calls = ([odd], [{"id": "1", "function": odd}], [{"id": "1", "function": {"name": "f", "arguments": odd}}])
    yield from ({"messages": [HI, {"role": "assistant", "tool_calls": each}]} for each in calls)
    yield from ({"messages": [{**HI, "content": parts}]} for parts in ([odd], [{"type": "text", "text": odd}]))


def check(live: Live, path: str, body: Mapping[str, Any]) -> None:
    content = json.dumps(body)
    response = live.http.post(path, content=content, headers={"content-type": "application/json"})
    if response.status_code == 504:  # a timeout that is odd and allowed
        assert response.json()["error"]["code"] == "deadline_exceeded", (content[:500], response.text)
        return
    assert response.status_code in (200, 400, 404), (content[:500], response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"], content[:500]
        missing = path == "/v1/messages" and response.status_code == 404
        assert error["type"] == ("not_found_error" if missing else "invalid_request_error"), content[:500]


@pytest.mark.parametrize("path", SCHEMAS)
def test_odd_values_in_every_field(live: Live, path: str) -> None:
    for body in bodies(path):
        check(live, path, body)


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:20])
def test_odd_values_inside_objects(live: Live, odd: Any) -> None:
    for more in nested(odd):
        check(live, CHAT, {"messages": [HI], "max_tokens": 2, **more})
