"""CORS: pages of allowed origins may call the server, and read its headers, streams and errors."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.api.live import Live, events, request, running, tiny_service

PAGE = "https://chat.example.com"
ORIGIN = {"origin": PAGE}
READABLE = {"x-request-id", "x-manylora-adapter", "x-manylora-ignored", "server-timing", "retry-after", "etag"}


@pytest.fixture(scope="module")
def web(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    adapter = {"red": folders["red"]}
    with running(tiny_service(tmp_path_factory.mktemp("web"), adapter=adapter, cors_origin=(PAGE,))) as live:
        yield live


def preflight(live: Live, path: str, method: str = "POST", **headers: str) -> httpx.Response:
    asked = {**ORIGIN, "access-control-request-method": method, **headers}
    return live.http.options(path, headers=asked)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/adapters/red", "/v1/nothing", "/"])
def test_preflights(web: Live, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
        answer = preflight(web, path, method, **{"access-control-request-headers": asked})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-allow-headers"] == asked
        assert method in answer.headers["access-control-allow-methods"].split(", ")
        assert int(answer.headers["access-control-max-age"]) > 0
        assert "x-request-id" in answer.headers


def test_a_page_on_the_internet_may_call_a_private_network(web: Live) -> None:
    answer = preflight(web, "/v1/models", **{"access-control-request-private-network": "true"})
    assert (answer.status_code, answer.headers["access-control-allow-private-network"]) == (200, "true")


@pytest.mark.parametrize(
    ("headers", "reason"),
    [({"origin": "https://elsewhere.example.com"}, "origin"), ({"access-control-request-method": "TRACE"}, "method")],
)
def test_refused_preflights_are_errors_of_the_usual_shape(web: Live, headers: dict[str, str], reason: str) -> None:
    answer = web.http.options("/v1/models", headers={**ORIGIN, "access-control-request-method": "GET", **headers})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"Disallowed CORS {reason}."
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert ("access-control-allow-origin" in answer.headers) == (reason != "origin")


def test_streams_and_answers_can_be_read(web: Live) -> None:
    for stream in (False, True):
        body = request(adapter="red", stream=stream)
        with web.http.stream("POST", "/v1/completions", json=body, headers=ORIGIN) as answer:
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert set(answer.headers["access-control-expose-headers"].split(", ")) >= READABLE
            assert "origin" in answer.headers["vary"].lower()
            assert events(answer) if stream else answer.read()


@pytest.mark.parametrize(
    ("method", "path", "status", "content"),
    [
        ("POST", "/v1/completions", 400, b"{"),
        ("POST", "/v1/completions", 404, b'{"prompt": "x", "model": "nobody"}'),
        ("POST", "/v1/completions", 413, bytes(3 << 20)),
        ("GET", "/v1/files", 404, b""),
        ("PATCH", "/v1/completions", 405, b""),
        ("POST", "/v1/adapters", 400, b"{}"),
    ],
)
def test_errors_can_be_read(web: Live, method: str, path: str, status: int, content: bytes) -> None:
    headers = {**ORIGIN, "content-type": "application/json"}
    answer = web.http.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert set(answer.headers["access-control-expose-headers"].split(", ")) >= READABLE


def test_forms_of_other_sites_are_refused(web: Live) -> None:
    """Browsers ask before a page sends JSON, but not before it sends a form, as an upload is."""
    form = {"data": {"name": "planted"}, "files": {"file": ("a.zip", b"")}}
    for headers, status in (
        ({"sec-fetch-site": "cross-site", "origin": "https://elsewhere.example.com"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", **ORIGIN}, 422),  # allowed: it is read, and found to be no archive
        ({"sec-fetch-site": "same-site", "origin": "http://localhost:3000"}, 422),
        ({}, 422),
    ):
        answer = web.http.post("/v1/adapters", **form, headers=headers)
        assert answer.status_code == status, answer.text
    assert web.http.get("/v1/models", headers={"sec-fetch-site": "cross-site"}).status_code == 200
