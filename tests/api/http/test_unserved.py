"""Paths and names that do not exist: OpenAI's other endpoints, wrong base URLs, what is misspelt."""

from typing import Any

import pytest
from openai import NotFoundError, OpenAI

from server.api.http.unserved import NOT_SERVED
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, request


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
@pytest.mark.parametrize("rest", ["", "/x", "/x/y?z=1", "/"])
def test_endpoints_of_openai_that_are_not_served(live: Live, name: str, rest: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        error = refused(live, live.http.request(method, f"/v1/{name}{rest}"), 404, None)
        assert error["code"] == "unknown_url"
        assert f"does not have OpenAI's `/v1/{name}`" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "reason"),
    [
        ("GET", "/v1/responses/resp_1", "keeps no responses"),
        ("DELETE", "/v1/responses/resp_1", "keeps no responses"),
        ("GET", "/v1/responses/resp_1/input_items", "keeps no responses"),
        ("GET", "/v1/chat/completions/chatcmpl-1", "keeps no completions"),
        ("POST", "/v1/messages/batches", "does not have Anthropic's `/v1/messages/batches`"),
    ],
)
def test_what_would_have_to_be_stored(live: Live, method: str, path: str, reason: str) -> None:
    response = live.http.request(method, path)
    assert response.status_code == 404
    assert f"This server {reason}: {method} {path} is not served here." == response.json()["error"]["message"]


def test_the_sdk_shows_the_reason(live: Live) -> None:
    with (
        OpenAI(base_url=f"{live.http.base_url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(NotFoundError, match="is not served here"),
    ):
        client.files.list()


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/models/red", "/v1/models/red"),
        ("GET", "/v1/v1/models", "/v1/models"),
        ("POST", "/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/completions", "/v1/completions"),
        ("POST", "/api/v1/completions", "/v1/completions"),
        ("POST", "/v1/chat/completion", "/v1/chat/completions"),
        ("POST", "/v1/completion", "/v1/completions"),
        ("POST", "/chat/completion", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completion", "/v1/chat/completions"),
        ("POST", "/v1/chat/complete", "/v1/chat/completions"),
        ("POST", "/v1/embedding", "/v1/embeddings"),
        ("GET", "/v1/model", "/v1/models"),
        ("GET", "/healthz", "/health"),
        ("GET", "/v1/completion", None),
        ("GET", "/completions", None),
        ("GET", "/v1/nothing", None),
        ("GET", "/files", None),
        ("GET", "/" + "/".join("x" * 100), None),
        ("GET", "/" + "x" * 5000, None),
    ],
)
def test_a_wrong_path_is_told(live: Live, method: str, path: str, meant: str | None) -> None:
    error = refused(live, live.http.request(method, path), 404, None)
    assert (f"Did you mean {meant}?" in error["message"]) == (meant is not None)
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"model": "Red"}, "red"),
        ({"model": "gren"}, "green"),
        ({"model": "blue"}, "team/blue"),
        ({"model": "tinny"}, "tiny"),
        ({"model": "red@7"}, "red"),
        ({"adapter": "team/blu"}, "team/blue"),
        ({"adapter": [{"name": "red"}, {"name": "grene"}]}, "green"),
        ({"adapter": "tinny"}, None),
        ({"model": "gpt-4o"}, None),
        ({"model": "x" * 200}, None),
    ],
)
def test_a_misspelt_name_is_told(live: Live, fields: dict[str, Any], meant: str | None) -> None:
    error = refused(live, live.http.post("/v1/completions", json=request(**fields)), 404, next(iter(fields)))
    assert error["message"].endswith(f" does not exist. Did you mean `{meant}`?" if meant else " does not exist.")


def test_a_misspelt_name_in_a_path_is_told(live: Live) -> None:
    for method, path in (("GET", "/v1/adapters/reds"), ("DELETE", "/v1/adapters/reds"), ("GET", "/v1/models/reds")):
        response = live.http.request(method, path)
        assert response.status_code == 404
        assert "Did you mean `red`?" in response.json()["error"]["message"]
