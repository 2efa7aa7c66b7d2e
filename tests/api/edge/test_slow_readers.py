"""Clients that do not read their answers: the server waits for a while, then frees everything they hold."""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from server.api.generation import responses, submit
from server.connections import Connection
from tests.api.live import Live, enduring_model, request, running, tiny_service, wait_for
from tests.api.operation.test_http import asking, connected, read_all

LONG = {"max_tokens": 15_000, "n": 8, "logprobs": 5}
"""Takes the enduring model far longer than a test waits, and has far more bytes than socket buffers hold."""


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    service = tiny_service(tmp_path_factory.mktemp("strict"), enduring_model(), write_timeout_seconds=1)
    with running(service) as live:
        yield live


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tiny_service(tmp_path_factory.mktemp("patient"), enduring_model())) as live:
        yield live


@contextmanager
def small_window(live: Live) -> Iterator[socket.socket]:
    """A connection whose buffers, on both sides, hold little."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect((live.http.base_url.host, live.http.base_url.port))
        wait_for(lambda: server_side(live, client))
        server_side(live, client)[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield client


def server_side(live: Live, client: socket.socket) -> list[Connection]:
    """Return the server's end of a connection, once it has accepted it."""
    found = []
    for each in list(live.server.connections):
        with suppress(OSError):  # it is being closed
            if each.getpeername() == client.getsockname():
                found.append(each)
    return found


def ended(live: Live) -> bool:
    """Whether nothing is left of any request but the client's own idle connection."""
    return live.idle() and len(live.server.connections) <= 1


def test_a_stream_that_nobody_reads_is_aborted(strict: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.api.telemetry.request_log")
    with small_window(strict) as client:
        client.sendall(asking(**LONG, stream=True))
        wait_for(lambda: strict.service.engine.stats().running > 0)
        wait_for(lambda: ended(strict))
        assert "cancelled" in {getattr(record, "outcome", None) for record in caplog.records}
        with pytest.raises(ConnectionResetError):
            read_all(client)
    assert strict.text(max_tokens=20)


def test_an_answer_that_nobody_reads_is_dropped(strict: Live) -> None:
    """Not streamed: the answer waits in memory, and the request has ended."""
    with small_window(strict) as client:
        client.sendall(asking(max_tokens=200, logprobs=5))
        wait_for(lambda: strict.service.engine.stats().running > 0)
        wait_for(strict.idle)
        assert len(strict.server.connections) >= 1
        wait_for(lambda: ended(strict))
        with pytest.raises(ConnectionResetError):
            read_all(client)


def test_a_slow_reader_gets_the_whole_answer(strict: Live) -> None:
    """It takes longer than the timeout, but never reads nothing for so long."""
    with small_window(strict) as client:
        client.sendall(
            asking(max_tokens=200, logprobs=5, stream=True).replace(
                b"Host: localhost", b"Host: localhost\r\nConnection: close"
            )
        )
        began, answer = time.monotonic(), b""
        while chunk := client.recv(2048):
            answer += chunk
            time.sleep(0.06 if time.monotonic() - began < 3 else 0)
    assert time.monotonic() - began > 1.5
    assert answer.rstrip(b"\r\n0").endswith(b"data: [DONE]")


def test_a_stream_that_is_far_behind_is_aborted(patient: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the timeout: what waits for the client to read must not fill the memory."""
    monkeypatch.setattr(responses, "MAX_BEHIND", 100)
    monkeypatch.setattr(submit, "SILENCE", 0.1)
    with small_window(patient) as client:
        client.sendall(asking(**LONG, stream=True))
        wait_for(lambda: patient.service.engine.stats().running > 0)
        wait_for(lambda: ended(patient))
        assert patient.service.settings.write_timeout_seconds == 60, "it was not the timeout"


def test_a_reader_that_keeps_up_is_not_behind(patient: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_BEHIND", 100)
    monkeypatch.setattr(submit, "SILENCE", 0.1)
    events = patient.stream(**request(max_tokens=200, logprobs=5))
    assert (
        sum(len(choice["logprobs"]["tokens"]) for event in events for choice in event["choices"] if choice["logprobs"])
        == 200
    )


def test_one_that_does_not_read_does_not_hold_up_others(patient: Live) -> None:
    with small_window(patient) as client, connected(patient) as other:
        client.sendall(asking(**LONG, stream=True))
        wait_for(lambda: patient.service.engine.stats().running > 0)
        other.sendall(asking(max_tokens=30).replace(b"Host: localhost", b"Host: localhost\r\nConnection: close"))
        assert read_all(other).startswith(b"HTTP/1.1 200 ")
    wait_for(patient.idle)
