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
    for value in (value for value in SOMETHING if value not in schema.unsupported[field]):
        error = refused(live, live.http.post(path, json=body(name, field, value)), 400, param)
        assert (error["code"], error["message"]) == ("unsupported_parameter", f"`{field}` is not supported.")
    expected = answer(live, name, plain)
    for value in (None, *schema.unsupported[field]):
        assert answer(live, name, body(name, field, value)) == expected, json.dumps(value)


@pytest.mark.parametrize(("name", "field"), cases("harmless"))
def test_a_field_without_effect_is_ignored(live: Live, name: str, field: str) -> None:
    expected = answer(live, name, SCHEMAS[name][2])
    for value in (None, *SOMETHING):
        assert answer(live, name, body(name, field, value)) == expected
