"""Paths that do not exist: OpenAI's other endpoints, and wrong base URLs."""

import pytest
from openai import NotFoundError, OpenAI

from server.api.http.unserved import NOT_SERVED
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
@pytest.mark.parametrize("rest", ["", "/x", "/x/y?z=1", "/"])
def test_endpoints_of_openai_that_are_not_served(live: Live, name: str, rest: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        error = refused(live, live.http.request(method, f"/v1/{name}{rest}"), 404, None)
        assert error["code"] == "unknown_url"
        assert f"does not have OpenAI's `/v1/{name}`" in error["message"]


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
        ("GET", "/completions", None),
        ("GET", "/v1/nothing", None),
        ("GET", "/files", None),
        ("GET", "/" + "/".join("x" * 100), None),
        ("GET", "/" + "x" * 5000, None),
    ],
)
def test_a_wrong_base_url_is_told(live: Live, method: str, path: str, meant: str | None) -> None:
    error = refused(live, live.http.request(method, path), 404, None)
    assert (f"Did you mean {meant}?" in error["message"]) == (meant is not None)
    assert len(error["message"]) < 400
