"""Fields of other servers: those refused by name, and those without effect, in every schema that lists some."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from server.api.schemas.base import TolerantSchema
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completion import CompletionRequest
from server.api.schemas.embeddings import EmbeddingRequest
from server.api.schemas.messages import Message
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, request

HI = {"role": "user", "content": "hi"}
CHAT = {"messages": [HI], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
Body = Mapping[str, Any]
SCHEMAS: Mapping[str, tuple[type[TolerantSchema], str, Body]] = {
    "chat": (ChatRequest, "/v1/chat/completions", CHAT),
    "completion": (CompletionRequest, "/v1/completions", request()),
    "embedding": (EmbeddingRequest, "/v1/embeddings", {"input": "hi"}),
    "message": (Message, "/v1/chat/completions", CHAT),
}
"""Name -> schema, path, and a body without the fields."""
SOMETHING: tuple[Any, ...] = ({"x": 1}, [{"x": 1}], "something", True)
"""Values that do something in any field that is not ignored."""

OTHER_NAMES = {"functions": "tools", "function_call": "tool_choice"}
"""Fields that a chat has under another name."""


def cases(kind: str) -> list[tuple[str, str]]:
    return [
        (name, field)
        for name, (schema, _, _) in SCHEMAS.items()
        for field in sorted(set(getattr(schema, kind)) - schema.model_fields.keys())
    ]


def body(name: str, field: str, value: Any) -> dict[str, Any]:
    """Return the body with a field, in the message if the schema is a message's."""
    plain = dict(SCHEMAS[name][2])
    if name == "message":
        return {**plain, "messages": [{**HI, field: value}]}
    return {**plain, field: value}


def answer(live: Live, name: str, content: Body) -> Any:
    response = live.http.post(SCHEMAS[name][1], json=content)
    assert response.status_code == 200, response.text
    answered: dict[str, Any] = response.json()
    return answered.get("choices") or answered["data"]


@pytest.mark.parametrize(("name", "field"), cases("unsupported"))
def test_a_field_that_is_not_supported_is_refused_by_name(live: Live, name: str, field: str) -> None:
    schema, path, plain = SCHEMAS[name]
    param = f"messages.0.{field}" if name == "message" else field
    served = (
        [value for value in schema.unsupported[field] if value not in ("", [], {})] if field not in OTHER_NAMES else []
    )
    for value in (value for value in SOMETHING if value not in schema.unsupported[field]):
        error = refused(live, live.http.post(path, json=body(name, field, value)), 400, param)
        assert error["code"] == "unsupported_parameter"
        assert error["message"].startswith(f"`{field}` is not supported")
        assert all(json.dumps(value) in error["message"] for value in served), "it says which values are accepted"
        assert name != "chat" or field not in OTHER_NAMES or f"`{OTHER_NAMES[field]}`?" in error["message"]
    expected = answer(live, name, plain)
    for value in (None, *schema.unsupported[field]):
        assert answer(live, name, body(name, field, value)) == expected, json.dumps(value)


@pytest.mark.parametrize(("name", "field"), cases("harmless"))
def test_a_field_without_effect_is_ignored(live: Live, name: str, field: str) -> None:
    expected = answer(live, name, SCHEMAS[name][2])
    for value in (None, *SOMETHING):
        assert answer(live, name, body(name, field, value)) == expected


@pytest.mark.parametrize(
    ("path", "plain", "field", "meant"),
    [
        ("/v1/responses", {"input": "hi"}, "max_tokens", "max_output_tokens"),
        ("/v1/responses", {"input": "hi"}, "max_completion_tokens", "max_output_tokens"),
        ("/v1/responses", {"input": "hi"}, "response_format", "text"),
        ("/v1/responses", {"input": "hi"}, "stop_sequences", "stop"),
        ("/v1/responses", {"input": "hi"}, "functions", "tools"),
        ("/v1/chat/completions", CHAT, "max_output_tokens", "max_completion_tokens"),
        ("/v1/chat/completions", CHAT, "stop_sequences", "stop"),
        ("/v1/chat/completions", CHAT, "adapters", "adapter"),
        ("/v1/completions", request(), "max_new_tokens", "max_tokens"),
        ("/v1/completions", request(), "repeat_penalty", "repetition_penalty"),
        ("/v1/completions", request(), "temprature", "temperature"),
        ("/v1/embeddings", {"input": "hi"}, "model_name", "model"),
    ],
)
def test_a_field_of_another_api_is_told_by_its_name_here(
    live: Live, path: str, plain: Body, field: str, meant: str
) -> None:
    error = refused(live, live.http.post(path, json={**plain, field: 5}), 400, field)
    assert error["code"] == "unknown_parameter"
    assert f"did you mean `{meant}`?" in error["message"]
