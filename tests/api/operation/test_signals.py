"""A real process and its signals: what it finishes, what it refuses, how open streams end, and its exit status."""

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import httpx
import pytest

from server.api.serve import CLOSE_SECONDS
from server.watchdog import EXIT_STATUS
from tests.api.forks import Forked, Forks
from tests.api.live import request, wait_for

SERVERS = "tests.api.operation.servers"
ENDLESS = 16_000
"""Tokens that take the enduring model longer than any test waits."""


def streaming(stack: ExitStack, server: Forked, tokens: int) -> Iterator[str]:
    """The lines of a stream that has begun."""
    body = request(max_tokens=tokens, stream=True)
    lines = stack.enter_context(server.http.stream("POST", "/v1/completions", json=body)).iter_lines()
    next(lines)
    return lines


def last(lines: Iterator[str]) -> str:
    return [line for line in lines if line][-1]


def test_sigterm_finishes_what_is_open_and_refuses_what_is_new(forks: Forks, tmp_path: Path) -> None:
    """Also what a client reads slowly: it is sent within the drain time, and not only as long as connections close."""
    with forks.server(f"{SERVERS}:enduring", tmp_path, drain_seconds=300) as server, ExitStack() as stack:
        lines = streaming(stack, server, 1000)
        reader = slow_reader(stack, server, 800)
        wait_for(lambda: running(server) == 2)
        wait_for(lambda: running(server) <= 1)  # computed to its end, and not read
        assert server.http.get("/readyz").status_code == 200
        server.send(SIGTERM)
        unready = server.http.get("/readyz")
        assert (unready.status_code, unready.json()) == (503, {"status": "draining"})
        assert server.http.get("/livez").status_code == 200
        refused = server.http.post("/v1/completions", json=request())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        assert last(lines) == "data: [DONE]"
        received = b"".join(reader.recv(65536) for _ in range(20))
        time.sleep(CLOSE_SECONDS + 2)
        while part := reader.recv(65536):
            received += part
        assert b'"completion_tokens":800' in received
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.wait() == 0
    assert "finishing " in server.log()


def test_the_server_says_that_only_slow_readers_keep_it_from_ending(forks: Forks, tmp_path: Path) -> None:
    with forks.server(f"{SERVERS}:enduring", tmp_path, drain_seconds=300) as server, ExitStack() as stack:
        reader = slow_reader(stack, server, 800, stream=False)
        wait_for(lambda: ended(server) == 1)
        server.send(SIGTERM)
        server.wait_for_log("sending 1 answer that clients have yet to read\n")
        received = b""
        while part := reader.recv(65536):
            received += part
        assert b'"completion_tokens":800' in received
        assert received.endswith(b"}")
        assert server.wait() == 0
    assert "finishing " not in server.log()


def slow_reader(stack: ExitStack, server: Forked, tokens: int, *, stream: bool = True) -> socket.socket:
    """A connection with a large answer of this many tokens, of which nothing is read yet."""
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((server.http.base_url.host, server.http.base_url.port or 0))
    client.settimeout(60)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    body = json.dumps(request(max_tokens=tokens, stream=stream, **options, logprobs=5)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    return client


def running(server: Forked) -> float:
    """How many sequences run or wait."""
    return metrics(server, "manylora_requests_running", "manylora_requests_waiting")


def ended(server: Forked) -> float:
    """How many requests have been answered in full."""
    return metrics(server, 'manylora_requests_total{outcome="ok"}')


def metrics(server: Forked, *names: str) -> float:
    """The sum of some metrics."""
    samples = [line.split() for line in server.http.get("/metrics").text.splitlines()]
    return sum(float(words[1]) for words in samples if words[0] in names)


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": request(max_tokens=ENDLESS),
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": ENDLESS,
        "ignore_eos": True,
        "temperature": 0,
    },
    "/v1/responses": {"input": "hi", "max_output_tokens": ENDLESS, "ignore_eos": True, "temperature": 0},
    "/v1/messages": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": ENDLESS,
        "ignore_eos": True,
        "temperature": 0,
    },
}


def test_after_the_drain_time_every_stream_ends_with_an_error_event(forks: Forks, tmp_path: Path) -> None:
    """Streams of all endpoints, those that wait for their turn, and whole answers: none is cut silently."""
    settings = {"drain_seconds": 1, "max_batch_sequences": 3}
    with forks.server(f"{SERVERS}:enduring", tmp_path, **settings) as server, ThreadPoolExecutor(9) as pool:

        def stream(path: str) -> tuple[int, str]:
            with server.http.stream("POST", path, json={**BODIES[path], "stream": True}) as response:
                return response.status_code, "".join(response.iter_text())

        def whole(path: str) -> httpx.Response:
            return server.http.post(path, json=BODIES[path])

        streams = [pool.submit(stream, path) for path in BODIES]
        answers = [pool.submit(whole, path) for path in BODIES]
        wait_for(lambda: running(server) == 8)
        server.send(SIGTERM)
        for future in streams:
            assert_ends_with_an_error(future)
        for answer in answers:
            assert answer.result().status_code == 503
            assert "shutting down" in answer.result().json()["error"]["message"]
        assert server.wait() == 0
    assert "Still in progress at the end of the drain time, and aborted: 8 requests" in server.log()
    assert "Traceback" not in server.log()


def assert_ends_with_an_error(stream: "Future[tuple[int, str]]") -> None:
    """A stream that had begun ends with an event; of one that had not, the status is 503."""
    status, text = stream.result()
    assert "shutting down" in text
    if status == 200:
        ending = [block for block in text.split("\n\n") if block][-1]
        assert '"error"' in ending
        assert "shutting down" in ending
    else:
        assert status == 503


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(SIGTERM, SIGTERM, -SIGTERM), (SIGTERM, SIGINT, 130), (SIGINT, SIGTERM, -SIGTERM), (SIGINT, SIGINT, 130)],
)
def test_a_second_signal_ends_at_once(
    forks: Forks, tmp_path: Path, first: Signals, second: Signals, status: int
) -> None:
    with forks.server(f"{SERVERS}:enduring", tmp_path, drain_seconds=600) as server, ExitStack() as stack:
        streaming(stack, server, ENDLESS)
        server.send(first)
        server.wait_for_log("finishing 1 request")
        server.send(second)
        began = time.monotonic()
        assert server.wait() == status
        assert time.monotonic() - began < 5


def test_a_hung_step_is_seen_ends_the_process_and_leaves_its_stacks(forks: Forks, tmp_path: Path) -> None:
    with forks.server(f"{SERVERS}:hanging", tmp_path, step_timeout=14) as server, ThreadPoolExecutor(1) as pool:
        server.http.post("/v1/completions", json=request()).raise_for_status()  # steps of this kind are known
        (tmp_path / "hang").touch()
        began = time.monotonic()
        hung = pool.submit(server.http.post, "/v1/completions", json=request())
        wait_for(lambda: server.http.get("/readyz").status_code == 503)
        assert time.monotonic() - began <= 10.5, "ten seconds, and what it takes to ask"
        assert server.http.get("/readyz").json() == {"status": "engine stuck"}
        assert server.http.get("/livez").status_code == 200, "a restart now would leave no stacks"
        assert server.wait() == EXIT_STATUS
        assert time.monotonic() - began < 25
        assert isinstance(hung.exception(), httpx.TransportError)
    log = server.log()
    assert re.search(r"A step has not ended for \d+ s: not ready", log)
    assert "(--step-timeout); the process ends with status 70" in log
    assert "in hangs" in log, "the stack of the engine's thread"


def test_a_slow_step_is_ready_again_and_a_hung_one_does_not_keep_the_server_from_ending(
    forks: Forks, tmp_path: Path
) -> None:
    settings = {"step_timeout": 600, "drain_seconds": 1}
    with forks.server(f"{SERVERS}:hanging", tmp_path, **settings) as server, ThreadPoolExecutor(1) as pool:
        server.http.post("/v1/completions", json=request()).raise_for_status()
        (tmp_path / "hang").touch()
        slow = pool.submit(server.http.post, "/v1/completions", json=request())
        wait_for(lambda: server.http.get("/readyz").status_code == 503)
        (tmp_path / "hang").unlink()
        assert slow.result().status_code == 200
        wait_for(lambda: server.http.get("/readyz").status_code == 200)
        (tmp_path / "hang").touch()
        hung = pool.submit(server.http.post, "/v1/completions", json=request())
        wait_for(lambda: running(server) == 1 or server.http.get("/readyz").status_code == 503)
        server.send(SIGTERM)
        assert hung.result().status_code == 503, "it is told, though the engine cannot tell it"
        assert server.wait() == EXIT_STATUS
    assert "The step has ended: ready again" in server.log()
