"""HTTP: methods, paths, connections and CORS."""

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import serve
from server.api.protocol.half_close import FIRST_BYTES, FIRST_POLL, HalfCloseProtocol
from tests.api.live import Live, enduring_model, request, running, tiny_service, unchanged, wait_for

LONG = {"max_tokens": 15_000}
"""A request that takes the enduring model seconds."""


@pytest.fixture(scope="module")
def enduring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with long answers that allows one origin (CORS)."""
    root = tmp_path_factory.mktemp("enduring")
    with running(tiny_service(root, enduring_model(), cors_origin=("https://chat.example.com",))) as live:
        yield live


@contextmanager
def connected(live: Live) -> Iterator[socket.socket]:
    with socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0), timeout=60) as client:
        yield client


def asking(version: str = "1.1", **fields: Any) -> bytes:
    """Return the bytes of a completion request."""
    body = json.dumps(request(**fields)).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_all(client: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    "path",
    [
        *("/livez", "/readyz", "/health", "/version", "/metrics", "/openapi.json", "/docs"),
        *("/v1/models", "/v1/models/red", "/v1/models/nobody", "/v1/adapters", "/v1/adapters/team/blue@1"),
        *("/v1/aliases", "/nowhere"),
    ],
)
def test_head_is_get_without_a_body(live: Live, path: str) -> None:
    whole, head = live.http.get(path), live.http.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    own = {"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())  # its values change
    fields = [{name: value for name, value in each.headers.items() if name not in own} for each in (whole, head)]
    assert fields[0] == fields[1]
    assert "transfer-encoding" in head.headers or int(head.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/completions", "POST, OPTIONS"),
        ("/v1/chat/completions", "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/adapters", "GET, POST, HEAD, OPTIONS"),
        ("/v1/adapters/red", "GET, DELETE, HEAD, OPTIONS"),
        ("/v1/adapters/red/pin", "GET, POST, DELETE, HEAD, OPTIONS"),  # it may be an adapter's name
        ("/v1/aliases/red", "GET, PUT, DELETE, HEAD, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
    ],
)
def test_allow_header_lists_all_methods(live: Live, path: str, methods: str) -> None:
    options = live.http.options(path)
    assert (options.status_code, options.content, options.headers["allow"]) == (204, b"", methods)
    with unchanged(live):
        refused = live.http.request("PATCH", path)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
    assert refused.json()["error"]["message"] == f"PATCH is not allowed on {path}."


def test_options_of_an_unknown_path_is_404(live: Live) -> None:
    response = live.http.options("/v1/nothing")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/v1/models/", "/v1/models"),
        ("//v1//models", "/v1/models"),
        ("/v1/models//red/", "/v1/models/red"),
        ("/v1/adapters/?limit=1", "/v1/adapters?limit=1"),
        ("/v1/adapters/team//blue@1/", "/v1/adapters/team/blue@1"),
        ("/v1/adapters/team%2Fblue", "/v1/adapters/team/blue"),
        ("/v1/aliases/", "/v1/aliases"),
        ("/version//", "/version"),
        ("//", "/"),
    ],
)
def test_redundant_slashes(live: Live, path: str, plain: str) -> None:
    base = str(live.http.base_url).rstrip("/")  # httpx would join them
    asked, same = httpx.get(base + path), httpx.get(base + plain)
    assert asked.status_code == same.status_code
    if same.status_code == 200:
        assert asked.content == same.content


@pytest.mark.parametrize(
    ("target", "status"),
    [
        *((f"{origin}/v1//models/?x=//", 200) for origin in ("http://models.example.com", "HTTPS://x:8443", "http://")),
        ("http://models.example.com", 200),
        ("http://models.example.com/nowhere", 404),
        ("/http://x/v1/models", 404),
    ],
)
def test_absolute_form_request_target(live: Live, target: str, status: int) -> None:
    """The form sent to proxies, which every server must accept."""
    with connected(live) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert read_all(client).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions", "/v1//completions//"])
def test_a_post_is_not_redirected(live: Live, path: str) -> None:
    response = httpx.post(str(live.http.base_url).rstrip("/") + path, json=request())
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == live.text()


def test_an_upload_with_a_slash_at_the_end_has_its_own_limit(live: Live) -> None:
    big = {"file": ("adapter_model.safetensors", bytes(2**20))}
    with unchanged(live):
        answer = live.http.post("/v1/adapters/", data={"name": "x"}, files=big)
    assert answer.status_code == 422, answer.text  # validated, not refused as too large


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/adapters/red%2F", "/v1/adapters/%2Fred", "/v1/adapters/team%2F%2Fblue", "/v1/adapters/team/../red"),
        *("/v1/adapters/..%2Fadapters%2Fred", "/v1/adapters/%2e%2e/adapters/red", "/v1/adapters/.%2Fred"),
        *("/v1/adapters/red%252F", "/v1/adapters/red%00", "/v1/adapters/%C0%AF", "/v1/adapters/red%0A"),
    ],
)
def test_percent_encoded_slash_is_part_of_a_name(live: Live, path: str) -> None:
    """None of these names ``red``, so none may delete it."""
    with connected(live) as client, unchanged(live):
        client.sendall(f"DELETE {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert read_all(client).startswith(b"HTTP/1.1 404 ")


def test_empty_name_is_not_the_list(live: Live) -> None:
    """``/v1/adapters/$NAME/`` with NAME unset."""
    with unchanged(live):
        assert httpx.delete(str(live.http.base_url).rstrip("/") + "/v1/adapters//").status_code == 405


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_half_closed_connection_gets_its_response(enduring: Live, stream: bool, version: str) -> None:
    """Also if its response takes so long that the connection is polled many times."""
    fields: Mapping[str, Any] = {"max_tokens": 2000, "stream": stream}
    with connected(enduring) as client:
        client.sendall(asking(version, **fields))
        client.shutdown(socket.SHUT_WR)
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 \r\n") or head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.count(FIRST_BYTES) == 1
    if stream:
        assert body.rstrip(b"\r\n0").endswith(b"data: [DONE]")
    else:
        assert json.loads(body)["usage"]["completion_tokens"] == 2000
        assert json.loads(body)["choices"][0]["text"] == enduring.text(max_tokens=2000)


def test_half_closed_connection_gets_whole_errors(enduring: Live) -> None:
    with connected(enduring) as client:
        client.sendall(asking(max_tokens=0))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).startswith(b"HTTP/1.1 400 ")


def test_half_close_after_pipelined_requests(enduring: Live) -> None:
    with connected(enduring) as client:
        client.sendall(asking() * 3)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).count(b"HTTP/1.1 200 ") == 3


def test_repeated_eof_is_handled_once(enduring: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling starts once, after any number of requests: each poll sends a byte of the response, and there are few."""
    pauses: list[float] = []
    look = HalfCloseProtocol._poll

    def noted(self: HalfCloseProtocol, pause: float) -> None:
        pauses.append(pause)
        look(self, pause)

    monkeypatch.setattr(HalfCloseProtocol, "_poll", noted)
    with connected(enduring) as client:
        client.sendall(asking(max_tokens=200) * 4)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).count(b"HTTP/1.1 200 ") == 4
    assert pauses.count(FIRST_POLL) == 1


def test_half_close_within_a_request_gets_no_response(enduring: Live) -> None:
    with connected(enduring) as client:
        client.sendall(asking()[:-1])
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
    wait_for(enduring.idle)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_after_half_close(enduring: Live, stream: bool, version: str) -> None:
    before = enduring.sampled()
    with connected(enduring) as client:
        client.sendall(asking(version, **LONG, stream=stream))
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: enduring.sampled() > before + 200)
    wait_for(enduring.idle)
    assert enduring.sampled() - before < LONG["max_tokens"] / 2, "it ran on"


def test_keep_alive_is_longer_than_a_load_balancers(live: Live) -> None:
    assert live.server.config.timeout_keep_alive == live.service.settings.keep_alive_seconds == 75


def test_idle_connection_is_closed_after_keep_alive(tmp_path: Path) -> None:
    with running(tiny_service(tmp_path, keep_alive_seconds=1)) as live, connected(live) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200 ")


def test_shutdown_does_not_wait_for_idle_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CLOSE_SECONDS", 600)  # how long it would wait
    with running(tiny_service(tmp_path)) as live, connected(live) as idle, connected(live) as fresh:
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: b"}" in idle.recv(65536))
        live.server.drain()
        wait_for(lambda: not live.thread.is_alive())
        assert (idle.recv(1), fresh.recv(1)) == (b"", b"")


def test_responses_say_connection_close_while_draining(tmp_path: Path) -> None:
    with running(tiny_service(tmp_path, enduring_model(), drain_seconds=60)) as live, connected(live) as busy:
        busy.sendall(asking(**LONG))
        wait_for(lambda: live.sampled() > 0)
        assert "connection" not in live.http.get("/readyz").headers
        live.server.drain()
        wait_for(lambda: live.http.get("/readyz").headers.get("connection") == "close")


ORIGIN = {"origin": "https://chat.example.com"}


def test_cors_of_an_allowed_origin(enduring: Live) -> None:
    asked = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = enduring.http.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN["origin"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    assert "x-request-id" in preflight.headers
    for answer in (
        enduring.http.post("/v1/completions", json=request(), headers=ORIGIN),
        enduring.http.get("/v1/nothing", headers=ORIGIN),
        enduring.http.put("/v1/models", headers=ORIGIN),
        enduring.http.post("/v1/completions", json={}, headers=ORIGIN),
        enduring.http.post("/v1/completions", content=bytes(3 << 20), headers=ORIGIN),
    ):
        assert answer.headers["access-control-allow-origin"] == ORIGIN["origin"], answer.text
        assert {"x-request-id", "x-manylora-adapter"} <= set(
            answer.headers["access-control-expose-headers"].split(", ")
        )


def test_cors_of_other_origins(enduring: Live, live: Live) -> None:
    other = {"origin": "https://chat.example.org"}
    assert "access-control-allow-origin" not in enduring.http.get("/v1/models", headers=other).headers
    assert "access-control-allow-origin" not in live.http.get("/v1/models", headers=ORIGIN).headers, "off by default"


def test_cors_of_any_origin(tmp_path: Path) -> None:
    with running(tiny_service(tmp_path, cors_origin=("*",))) as live:
        headers = live.http.get("/v1/models", headers=ORIGIN).headers
        assert headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in headers
