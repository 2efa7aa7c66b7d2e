"""Everything that a request can ask for has a limit, which ``docs/security.md`` lists."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from server.api.generation.submit import MAX_LOGPROBS_IN_ALL
from server.api.http.json_body import MAX_DEPTH
from server.api.protocol.request_head import MAX_HEAD, MAX_HEADERS
from server.api.registry.limits import MAX_REGISTRATIONS, MAX_UPLOADS
from server.api.registry.upload import MAX_FIELD_BYTES, MAX_FIELDS
from server.api.routes.tokenize import MAX_TOKENS
from server.api.schemas import embeddings, generation, messages, score, structured, templates, tools
from server.api.schemas.anthropic import requests as anthropic
from server.api.schemas.registry import MAX_TARGETS
from server.api.schemas.responses_api import items
from server.api.schemas.responses_api import requests as responses_api
from server.config import Settings
from server.structured.compiler import MAX_SOURCE
from server.structured.json_schemas import MAX_DEPTH as SCHEMA_DEPTH
from server.structured.json_schemas import MAX_OPTIONAL, MAX_PROPERTIES
from tests.api.live import Live
from tests.openai_page import ROOT, is_test, table

PAGE = ROOT / "docs" / "security.md"
TEST = "api/edge/test_request_limits.py::test_a_request_above_a_limit_is_refused"
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "x"}
PARAGRAPH = {"type": "text", "text": ""}
FUNCTION = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


class Case(NamedTuple):
    """A limit, and a request with so many of something."""

    limit: int
    path: str
    body: Callable[[int], dict[str, Any]]
    param: str | None


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], "max_tokens": 1, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", "max_tokens": 1, **fields}


def named_tools(count: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{number}"}} for number in range(count)]


def flat_tools(count: int, schema: str) -> list[dict[str, Any]]:
    return [{"type": "function", "name": f"f{number}", schema: {"type": "object"}} for number in range(count)]


def nested(depth: int, inner: Any = 0) -> Any:
    """Return a value within ``depth`` arrays."""
    for _ in range(depth):
        inner = [inner]
    return inner


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def flat_schema(properties: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {} for number in range(properties)}}


def deep_schema(depth: int) -> dict[str, Any]:
    """Return a schema within ``depth`` others."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


CASES = {
    "`messages`": Case(messages.MAX_MESSAGES, CHAT, lambda n: chat(messages=[USER] * n), "messages"),
    "parts of a message": Case(
        messages.MAX_PARTS,
        CHAT,
        lambda n: chat(messages=[{"role": "user", "content": [PARAGRAPH] * n}]),
        "messages.0.content",
    ),
    "`tool_calls` of a message": Case(
        tools.MAX_CALLS,
        CHAT,
        lambda n: chat(messages=[{"role": "assistant", "tool_calls": [FUNCTION] * n}]),
        "messages.0.tool_calls",
    ),
    "`tools`": Case(tools.MAX_TOOLS, CHAT, lambda n: chat(tools=named_tools(n)), "tools"),
    "`documents`": Case(templates.MAX_DOCUMENTS, CHAT, lambda n: chat(documents=[{}] * n), "documents"),
    "`chat_template_kwargs`, names": Case(
        templates.MAX_VARIABLES,
        CHAT,
        lambda n: chat(chat_template_kwargs={f"v{number}": 0 for number in range(n)}),
        "chat_template_kwargs",
    ),
    "`chat_template_kwargs`, characters": Case(
        templates.MAX_VARIABLES_LENGTH,
        CHAT,
        lambda n: chat(chat_template_kwargs={"v": "x" * (n - len('{"v": ""}'))}),
        "chat_template_kwargs",
    ),
    "`prompt`, texts": Case(generation.MAX_CHOICES, TEXT, lambda n: text(prompt=["x"] * n), "prompt"),
    "`n`": Case(generation.MAX_CHOICES, CHAT, lambda n: chat(n=n), "n"),
    "`best_of`": Case(generation.MAX_CHOICES, TEXT, lambda n: text(best_of=n), "best_of"),
    "`n`, over all prompts": Case(generation.MAX_CHOICES, TEXT, lambda n: text(prompt=["x"] * 2, n=(n + 1) // 2), "n"),
    "`logprobs`": Case(generation.MAX_LOGPROBS, TEXT, lambda n: text(logprobs=n), "logprobs"),
    "`top_logprobs`": Case(
        generation.MAX_LOGPROBS, CHAT, lambda n: chat(logprobs=True, top_logprobs=n), "top_logprobs"
    ),
    "`prompt_logprobs`": Case(generation.MAX_LOGPROBS, CHAT, lambda n: chat(prompt_logprobs=n), "prompt_logprobs"),
    "`stop`, texts": Case(
        generation.MAX_STOPS, CHAT, lambda n: chat(stop=[f"{number};" for number in range(n)]), "stop"
    ),
    "`stop`, characters": Case(generation.MAX_STOP_LENGTH, CHAT, lambda n: chat(stop="x" * n), "stop.0"),
    "`stop_token_ids`": Case(
        generation.MAX_STOP_TOKENS, CHAT, lambda n: chat(stop_token_ids=[0] * n), "stop_token_ids"
    ),
    "`logit_bias`": Case(
        generation.MAX_BIAS, CHAT, lambda n: chat(logit_bias={str(number): 0 for number in range(n)}), "logit_bias"
    ),
    "`user`": Case(generation.MAX_USER_LENGTH, CHAT, lambda n: chat(user="x" * n), "user"),
    "`model` and other names": Case(256, CHAT, lambda n: chat(model="x" * n), "model"),
    "`adapter`, a mix": Case(
        generation.MAX_MIX, CHAT, lambda n: chat(adapter=[{"name": "red", "weight": 0.1}] * n), "adapter"
    ),
    "`guided_choice`": Case(structured.MAX_CHOICES, CHAT, lambda n: chat(guided_choice=["x"] * n), "guided_choice"),
    "a grammar or schema, characters": Case(MAX_SOURCE, CHAT, lambda n: chat(guided_regex="x" * n), "guided_regex"),
    "a schema, levels": Case(SCHEMA_DEPTH, CHAT, lambda n: chat(guided_json=json.dumps(deep_schema(n))), "guided_json"),
    "a schema, properties": Case(
        MAX_PROPERTIES,
        CHAT,
        lambda n: chat(**json_schema(flat_schema(n) | {"required": list(flat_schema(n)["properties"])})),
        "response_format.json_schema.schema",
    ),
    "a schema, optional properties of an object": Case(
        MAX_OPTIONAL, CHAT, lambda n: chat(**json_schema(flat_schema(n))), "response_format.json_schema.schema"
    ),
    "levels of JSON": Case(MAX_DEPTH, CHAT, lambda n: chat(metadata=nested(n - 1)), None),
    "`input` of embeddings": Case(embeddings.MAX_INPUTS, "/v1/embeddings", lambda n: {"input": ["x"] * n}, "input"),
    "`prompt` of scores": Case(
        score.MAX_PROMPTS, "/v1/score", lambda n: {"prompt": ["x"] * n, "continuations": [["y"]] * n}, "prompt"
    ),
    "`continuations`": Case(
        score.MAX_CONTINUATIONS, "/v1/score", lambda n: {"prompt": "x", "continuations": ["y"] * n}, "continuations"
    ),
    "`tokens` of `/detokenize`": Case(MAX_TOKENS, "/detokenize", lambda n: {"tokens": [1] * n}, "tokens"),
    "`input` of responses": Case(
        items.MAX_ITEMS, RESPONSES, lambda n: {"input": [USER] * n, "max_output_tokens": 1}, "input"
    ),
    "`tools` of responses": Case(
        responses_api.MAX_TOOLS,
        RESPONSES,
        lambda n: {"input": "x", "max_output_tokens": 1, "tools": flat_tools(n, "parameters")},
        "tools",
    ),
    "`messages` of `/v1/messages`": Case(
        anthropic.MAX_MESSAGES, MESSAGES, lambda n: {"messages": [USER] * n, "max_tokens": 1}, "messages"
    ),
    "blocks of a message": Case(
        messages.MAX_PARTS,
        MESSAGES,
        lambda n: {"messages": [{"role": "user", "content": [PARAGRAPH] * n}], "max_tokens": 1},
        "messages.0.content",
    ),
    "`tools` of `/v1/messages`": Case(
        anthropic.MAX_TOOLS,
        MESSAGES,
        lambda n: {
            "messages": [USER],
            "max_tokens": 1,
            "tools": [{"name": f"f{number}", "input_schema": {"type": "object"}} for number in range(n)],
        },
        "tools",
    ),
    "`targets` of an alias": Case(
        MAX_TARGETS,
        "PUT /v1/aliases/many",
        lambda n: {"targets": [{"adapter": f"a{number}"} for number in range(n)]},
        "targets",
    ),
    "`path` or `source` of a registration": Case(
        4096, "/v1/adapters", lambda n: {"name": "x", "path": "x" * n}, "path"
    ),
}
"""First cell of a row -> its limit, and a request at it."""

ELSEWHERE = {
    "a body": (
        int(Settings.model_fields["max_body_mib"].default),
        "api/generation/test_bad_input.py::test_a_body_larger_than_allowed",
    ),
    "the request line and all headers": (MAX_HEAD, "api/edge/test_request_heads.py::test_heads_have_a_limit"),
    "headers": (MAX_HEADERS, "api/edge/test_request_heads.py::test_heads_have_a_limit"),
    "digits of a number": (4300, "api/http/test_json_body.py::test_bodies_that_no_request_may_have"),
    "log probabilities in all": (MAX_LOGPROBS_IN_ALL, "api/edge/test_request_limits.py::test_log_probabilities_in_all"),
    "fields of an upload": (MAX_FIELDS, "api/registry/test_upload.py::test_fields_that_are_refused"),
    "a field of an upload": (MAX_FIELD_BYTES, "api/registry/test_upload.py::test_fields_that_are_refused"),
    "files of an upload": (4096, "api/registry/test_upload.py::test_too_many_files"),
    "members of an archive": (4096, "unit/adapters/test_archive.py::test_too_many_members"),
    "uploads at once": (MAX_UPLOADS, "api/registry/test_limits.py::test_concurrent_uploads_are_limited"),
    "registrations at once": (
        MAX_REGISTRATIONS,
        "api/registry/test_limits.py::test_rolling_back_does_not_wait_for_downloads",
    ),
}
"""First cell of a row -> its limit, and the test that shows it."""


def ask(live: Live, case: Case, count: int) -> tuple[int, dict[str, Any]]:
    """Return the status and the error of a request with ``count`` of something; empty if there is no error."""
    method, _, path = case.path.rpartition(" ")
    response = live.http.request(method or "POST", path, json=case.body(count))
    answer = response.json()
    return response.status_code, answer.get("error") or {}


@pytest.mark.parametrize("row", CASES)
def test_a_request_above_a_limit_is_refused(roomy: Live, row: str) -> None:
    """With 400, the field and the limit; one at the limit is not refused for it."""
    case = CASES[row]
    named = re.compile(rf"(at most|more than|less than or equal to|may have) {case.limit}\b")
    status, error = ask(roomy, case, case.limit + 1)
    assert (status, error.get("param")) == (400, case.param), error
    assert named.search(error["message"]), error["message"]
    status, error = ask(roomy, case, case.limit)
    assert not named.search(error.get("message", "")), error
    assert status < 500, error


def test_log_probabilities_in_all(roomy: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request could otherwise ask for gigabytes: 128 answers of a whole context, with 20 alternatives each."""
    whole = {"n": 128, "max_tokens": 4000}
    for path, fields, param in (
        (TEXT, text(**whole, logprobs=20), "logprobs"),
        (CHAT, chat(**whole, logprobs=True, top_logprobs=20), "top_logprobs"),
    ):
        response = roomy.http.post(path, json=fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert f"at most {MAX_LOGPROBS_IN_ALL} are served" in response.json()["error"]["message"]
    monkeypatch.setattr("server.api.generation.submit.MAX_LOGPROBS_IN_ALL", 100)
    for prompt, status in ((list(range(1, 25)), 200), (list(range(1, 60)), 400)):
        response = roomy.http.post(TEXT, json=text(prompt=prompt, prompt_logprobs=1, logprobs=1, n=2))
        assert response.status_code == status
    assert response.json()["error"]["param"] == "prompt_logprobs"


def test_the_page_lists_every_limit() -> None:
    rows = {
        row[0]: (int(re.sub(r"[^0-9]", "", row[1].split()[0])), row[-1].strip("`")) for row in table("Limits", PAGE)
    }
    expected = {row: (case.limit, TEST) for row, case in CASES.items()} | ELSEWHERE
    assert rows == expected
    assert [test for _, test in rows.values() if not is_test(test)] == []
