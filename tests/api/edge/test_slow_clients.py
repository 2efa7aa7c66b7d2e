"""Clients that do not send what they began, or send it a byte at a time."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from server.api.http import body_limits
from tests.api.live import Live, request, running, tiny_service, wait_for
from tests.api.operation.test_http import connected, read_all

SECONDS = 0.5
"""The server's timeout. It looks at its connections once a second."""
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STALLED = 600
"""Half-sent chat requests that stayed open for ever in an earlier version."""


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tiny_service(tmp_path_factory.mktemp("impatient"), request_timeout_seconds=SECONDS)) as live:
        yield live


def error_of(answer: bytes) -> tuple[int, dict[str, object]]:
    """Return the status and the error of one whole response."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"x-request-id: " in head.lower()
    return int(head.split(b" ")[1]), json.loads(body)["error"]


def trickle(client: socket.socket) -> bytes:
    """Send a byte at a time until the server answers or closes; return what it sent."""
    client.settimeout(0.05)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            client.sendall(b"a")
            return client.recv(65536) + read_all(client)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return b""
    raise AssertionError("the server waits for ever")


def test_600_half_sent_requests_are_ended(impatient: Live) -> None:
    halves = (HEAD, HEAD + b"Content-Length: 900\r\n\r\n" + b'{"messages": [')
    with ExitStack() as stack:
        clients = []
        for number in range(STALLED):
            clients.append(stack.enter_context(connected(impatient)))
            clients[-1].sendall(halves[number % 2])
        answers = [error_of(read_all(client)) for client in clients]
    assert {status for status, _ in answers} == {408}
    assert {error["message"] for _, error in answers} == {
        "The request's headers did not arrive in time.",
        "The body did not arrive in time.",
    }
    wait_for(lambda: len(impatient.server.connections) <= 1)
    assert impatient.text()


@pytest.mark.parametrize("sent", [b"GET /livez HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 100000\r\n\r\n"])
def test_a_byte_at_a_time_does_not_help(impatient: Live, sent: bytes) -> None:
    with connected(impatient) as client:
        client.sendall(sent)
        answer = trickle(client)
    assert answer == b"" or error_of(answer)[0] == 408


def test_chunks_without_an_end_are_ended(impatient: Live) -> None:
    with connected(impatient) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1;" + b"x" * 1000)
        assert error_of(read_all(client))[0] == 408


def test_a_connection_without_a_request_is_closed(impatient: Live) -> None:
    with connected(impatient) as client:
        assert read_all(client) == b""


def test_after_a_response_a_byte_begins_the_next_head(impatient: Live) -> None:
    """uvicorn's clock for idle connections stops with the first byte."""
    with connected(impatient) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(65536)
        client.sendall(b"G")
        assert error_of(read_all(client))[0] == 408


def test_an_idle_connection_stays_for_the_next_request(impatient: Live) -> None:
    """That has a timeout of its own, ``--keep-alive-seconds``."""
    with connected(impatient) as client:
        for _ in range(2):
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(SECONDS + 1.5)


def test_the_rest_of_a_refused_body_is_not_awaited(impatient: Live) -> None:
    """The response is sent before the body has come."""
    with connected(impatient) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
        assert b"HTTP/1.1" not in trickle(client)


def test_a_large_body_has_more_time(impatient: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "BYTES_A_SECOND", 1000)
    body = json.dumps(request(stop=["x" * 400] * 4)).encode()
    with connected(impatient) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        began = time.monotonic()
        for start in range(0, len(body), 300):
            client.sendall(body[start : start + 300])
            time.sleep(0.2)
        assert time.monotonic() - began > SECONDS
        assert read_all(client).startswith(b"HTTP/1.1 200 ")


def test_incomplete_bodies_share_a_limited_memory(impatient: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit that the middleware was made with is 256 MiB; here its own counter is nearly full."""
    middleware = impatient.server.config.loaded_app
    while not isinstance(middleware, body_limits.BodyLimitMiddleware):
        middleware = (
            getattr(middleware, "_app", None) or getattr(middleware, "app", None) or middleware.middleware_stack
        )
    monkeypatch.setattr(middleware, "_most", 1000)
    with connected(impatient) as first, connected(impatient) as second:
        first.sendall(HEAD + b"Content-Length: 2000\r\n\r\n" + b"x" * 900)
        wait_for(lambda: middleware._incomplete == 900)
        second.sendall(HEAD + b"Content-Length: 2000\r\n\r\n" + b"x" * 900)
        answer = read_all(second)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: " in answer
        assert b'"code":"too_many_bodies"' in answer
        assert impatient.text(), "a body that comes whole is served"
    wait_for(lambda: middleware._incomplete == 0)
