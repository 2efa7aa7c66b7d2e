"""Request smuggling, oversized heads and other bytes that no client of ours sends, against the real server."""

import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from server.api.protocol.request_head import MAX_HEAD, MAX_HEADERS
from tests.api.edge.test_slow_clients import error_of
from tests.api.live import Live, request, unchanged
from tests.api.operation.test_http import connected, read_all
from tests.api.telemetry.samples import value as metric

DELETE = b"DELETE /v1/adapters/red HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""What an attacker would smuggle."""
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def _unchanged(live: Live) -> Iterator[None]:
    with unchanged(live):
        yield


def send(live: Live, data: bytes) -> bytes:
    """Send bytes, close the sending side, and return all that the server sends until it closes the connection."""
    with connected(live) as client:
        with contextlib.suppress(OSError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            return read_all(client)
    return b""


def statuses(answer: bytes) -> list[int]:
    """Return the statuses of the responses in ``answer``."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % (5 + len(DELETE)),
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: identity, chunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n",
        b"Transfer-Encoding: chunked\r\n\tgzip\r\n",
        b"X: y\r\n Transfer-Encoding: chunked\r\n",
        b"X: y\nTransfer-Encoding: chunked\r\n",
        b"X: y\rTransfer-Encoding: chunked\r\n",
        b"X: y\0\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 6\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5 5\r\n",
        b"Content-Length: \xb2\r\n",
        b"Content-Length: %s\r\n" % (b"9" * 40),
        b"Content-Length : 5\r\n",
        b"Content-Length\r\n",
        b": 5\r\n",
    ],
    ids=repr,
)
def test_a_length_that_others_may_read_differently(live: Live, head: bytes) -> None:
    """One refusal, and nothing of what follows is taken as a request."""
    answer = send(live, POST + head + b"\r\n0\r\n\r\n" + DELETE)
    assert answer.count(b"HTTP/1.1 ") == 1
    status, error = error_of(answer)
    assert status in (400, 501)
    assert error["type"] in ("invalid_request_error", "server_error")


@pytest.mark.parametrize(
    "chunks",
    [
        b"3\r\nabcXX0\r\n\r\n",  # any two bytes instead of the line break, which h11 0.14 took
        b"3\r\nabc\n0\r\n\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"-1\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"F" * 21 + b"\r\nabc\r\n0\r\n\r\n",
    ],
    ids=lambda chunks: repr(chunks[:20]),
)
def test_chunks_that_others_may_read_differently(live: Live, chunks: bytes) -> None:
    answer = send(live, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + DELETE)
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert not answer.startswith(b"HTTP/1.1 2")


def test_what_is_refused_before_it_is_a_request_is_counted_and_logged(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    refused = {"method": "other", "route": "other", "status": "431"}
    send(live, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n")
    before = metric(live.http, "manylora_http_requests_total", **refused)
    with caplog.at_level(logging.INFO):
        answer = send(live, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n")
    assert statuses(answer) == [431]
    assert metric(live.http, "manylora_http_requests_total", **refused) == before + 1
    (line,) = (record for record in caplog.records if getattr(record, "status", None) == 431)
    assert vars(line)["client"] == "127.0.0.1"
    assert b"x-request-id: " + vars(line)["request_id"].encode() in answer
    assert "xxx" not in line.getMessage()


def test_chunks_are_a_body(live: Live) -> None:
    body = json.dumps(request()).encode()
    chunks = b"".join(b"%x;name=value\r\n%s\r\n" % (1, bytes([byte])) for byte in body) + b"0\r\nX-Trailer: y\r\n\r\n"
    answer = send(live, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "data",
    [
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: user@x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET /v1/adapters HTTP/1.1\r\nHost: x/livez?\r\n\r\n",
        b"GET /v1/adapters HTTP/1.1\r\nHost: x#\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x, y\r\n\r\n",
        b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET  /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1 \r\nHost: localhost\r\n\r\n",
        b"GET /livez\r\n\r\n",
        b"GET /li vez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/11\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\nHost: x\n\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"\r\n\r\nGET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_a_head_that_is_not_http(live: Live, data: bytes) -> None:
    answer = send(live, data)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert error_of(answer)[0] == 400


@pytest.mark.parametrize("host", ["x", "x:", "models.example.com:8443", "127.0.0.1", "[::1]:8000", "a_b~c", ""])
def test_hosts(live: Live, host: str) -> None:
    """All of these are hosts. Names are not this server's, as long as it has no keys."""
    answer = send(live, f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    status = 200 if host in ("127.0.0.1", "[::1]:8000", "") else 403
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_http_1_0_needs_no_host_and_closes(live: Live) -> None:
    with connected(live) as client:
        client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"y" * MAX_HEAD), 431),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * MAX_HEADERS + b"\r\n", 431),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"a:b\r\n" * 50_000 + b"\r\n", 431),
        (b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"y" * MAX_HEAD), 431),
        (b"GET /livez?%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"y=z&" * (MAX_HEAD // 4)), 431),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"y" * (MAX_HEAD - 100)), 200),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * (MAX_HEADERS - 2) + b"\r\n", 200),
    ],
    ids=lambda each: repr(each)[:50],
)
def test_heads_have_a_limit(live: Live, data: bytes, status: int) -> None:
    """Whether a head comes in one packet or in several."""
    for step in (len(data), 4000):
        with connected(live) as client:
            with contextlib.suppress(OSError):
                for start in range(0, len(data), step):
                    client.sendall(data[start : start + step])
                client.shutdown(socket.SHUT_WR)
            try:
                answer = read_all(client)
            except ConnectionResetError:  # it was closed while we sent on
                assert status == 431
                continue
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]


def test_a_header_of_64_mib_is_not_read_to_its_end(live: Live) -> None:
    """httptools took one."""
    sent = 0
    with connected(live) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
        with contextlib.suppress(OSError):
            while sent < 64 << 20:
                client.sendall(b"y" * 65536)
                sent += 65536
    assert sent < 16 << 20


def test_a_second_request_on_the_connection_is_checked_like_the_first(live: Live) -> None:
    good, bad = (
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    )
    answer = send(live, good + good + bad + DELETE)
    assert statuses(answer) == [200, 200, 400]


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    paths = [b"/livez", b"/nowhere", b"/v1/models", b"/version"]
    answer = send(
        live, b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\nx-request-id: %s\r\n\r\n" % (p, p) for p in paths)
    )
    lines = answer.split(b"\r\n")
    assert [line.split(b": ")[1] for line in lines if line.startswith(b"x-request-id")] == paths
    assert statuses(answer) == [200, 404, 200, 200]


@pytest.mark.parametrize("kind", [b"websocket", b"h2c"])
def test_an_upgrade_is_not_taken(live: Live, kind: bytes, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nSec-WebSocket-Key: eA==\r\n" % kind
    answer = send(live, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


@pytest.mark.parametrize("method", [b"CONNECT x:80", b"TRACE /livez", b"PRI *"])
def test_methods_of_proxies_are_refused(live: Live, method: bytes) -> None:
    answer = send(live, method + b" HTTP/1.1\r\nHost: localhost\r\nX: secret\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"404", b"405")
    assert b"secret" not in answer


def test_what_is_echoed_cannot_split_a_response(live: Live) -> None:
    for value in (b"a\tb", b"a b", b"\xe4", b"x" * 129, b""):
        answer = send(live, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nx-request-id: %s\r\n\r\n" % value)
        assert b"x-request-id: %s\r\n" % value not in answer
    answer = send(live, b"GET /v1/a%0d%0aX-Injected:%20y?%0d%0aX-Injected: HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer += send(live, b"PUT /v1/models%0d%0aX-Injected:%20y HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.count(b"HTTP/1.1 404 ") == 2
    assert b"\nX-Injected" not in answer


def test_browsers_do_not_guess_types_and_see_no_server(live: Live) -> None:
    for path in ("/livez", "/nowhere", "/docs", "/metrics"):
        headers = live.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    assert b"x-content-type-options: nosniff" in send(live, b"GET /livez\r\n\r\n")


def test_a_hostile_range_takes_no_time(live: Live) -> None:
    page = live.http.get("/docs").text
    asset = next(part for part in page.split('"') if part.endswith(".js"))
    began = time.monotonic()
    answer = live.http.get(asset, headers={"range": "bytes=" + ",".join(f"{n}-{n}" for n in range(2500))})
    assert answer.status_code in (200, 206, 400, 416)
    assert time.monotonic() - began < 5
    digits = {"range": "bytes=" + "0" * 30_000}
    assert live.http.get(asset, headers=digits).status_code < 500
    assert time.monotonic() - began < 5


def test_a_repeated_request_id_is_no_key(live: Live) -> None:
    """Requests with the same id run beside each other, and each gets its own answer."""
    prompts = ["Once upon a time", "Two", "Three men"]
    alone = [live.text(prompt=prompt, max_tokens=40) for prompt in prompts]

    def ask(prompt: str) -> str:
        answer = httpx.post(
            f"{live.http.base_url}/v1/completions",
            json=request(prompt=prompt, max_tokens=40),
            headers={"x-request-id": "the-same"},
            timeout=60,
        )
        assert answer.headers["x-request-id"] == "the-same"
        text: str = answer.json()["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, prompts * 2)) == alone * 2
