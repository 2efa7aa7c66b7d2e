"""Requests are freed when their connection closes, and not when Python's collector next looks for garbage."""

import gc
import json
import socket
import struct
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import httpx
import pytest

from server.api.protocol.client import ClientProtocol
from tests.adapter_folders import CONFIG, WEIGHTS
from tests.api.live import PATIENCE, Live, enduring_model, request, running, tiny_service, wait_for


@pytest.fixture(scope="module")
def enduring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tiny_service(tmp_path_factory.mktemp("enduring"), enduring_model())) as live:
        yield live


@contextmanager
def garbage() -> Iterator[Counter[str]]:
    """Count the objects, by class, that the block leaves to the collector."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(type(each).__name__ for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def closed(live: Live) -> bool:
    """Whether nothing is left of any request but the fixture's own idle connection."""
    return live.idle() and len(live.server.connections) <= 1


def is_idle(protocol: object) -> bool:
    """Whether a connection waits for its next request."""
    assert isinstance(protocol, ClientProtocol)
    return protocol.timeout_keep_alive_task is not None


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        pytest.param({}, None, id="a whole answer"),
        pytest.param({"stream": True}, None, id="a stream"),
        pytest.param({"stream": True, "max_tokens": 15_000}, 1, id="a stream that its client leaves"),
    ],
)
def test_a_closed_connection_leaves_no_request_to_the_collector(
    enduring: Live, fields: Mapping[str, object], lines: int | None
) -> None:
    enduring.complete()
    with garbage() as found:
        with (
            httpx.Client(base_url=enduring.http.base_url, timeout=PATIENCE) as http,
            http.stream("POST", "/v1/completions", json=request(**fields)) as response,
        ):
            assert list(islice(response.iter_lines(), lines))
        wait_for(lambda: closed(enduring))
        enduring.complete()  # what the event loop still does for the connection comes before it
    kinds = ("ClientProtocol", "RequestResponseCycle", "Generation", "Sequence", "EventQueue", "Choice")
    assert {kind: found[kind] for kind in kinds} == dict.fromkeys(kinds, 0)


def test_an_unfinished_body_is_not_left_to_the_collector(enduring: Live) -> None:
    """It may have megabytes, and the collector only counts objects."""
    enduring.complete()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99"
    with garbage() as found:
        for path in ("completions", "chat/completions", "embeddings"):
            address = (enduring.http.base_url.host, enduring.http.base_url.port)
            with socket.create_connection(address, PATIENCE) as client:
                client.sendall(head.replace(b"completions", path.encode(), 1) + b'\r\n\r\n{"prompt": "')
                wait_for(lambda: len(enduring.server.server_state.tasks) == 1)
        wait_for(lambda: closed(enduring))
        enduring.complete()
    kinds = ("ClientProtocol", "RequestResponseCycle", "JsonRequest", "ClientDisconnect")
    assert {kind: found[kind] for kind in kinds} == dict.fromkeys(kinds, 0)


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", b"\0\1\2\r\n\r\n"])
def test_a_refused_head_is_not_left_to_the_collector(enduring: Live, head: bytes) -> None:
    enduring.complete()
    with garbage() as found:
        with socket.create_connection((enduring.http.base_url.host, enduring.http.base_url.port), PATIENCE) as client:
            client.sendall(head)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
        wait_for(lambda: closed(enduring))
        enduring.complete()
    assert (found["ClientProtocol"], found["_H11Connection"]) == (0, 0)


def test_a_refused_upload_is_not_left_to_the_collector(enduring: Live) -> None:
    files = [("files", (CONFIG, b'{"peft_type": "LORA", "r": 4}')), ("files", (WEIGHTS, bytes(64)))]
    with garbage() as found, httpx.Client(base_url=enduring.http.base_url, timeout=PATIENCE) as http:
        refused = http.post("/v1/adapters", data={"name": "x"}, files=files)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "adapter_rejected")
        enduring.complete()
    kinds = ("RegistryView", "Selection", "AdapterRejected", "InvalidAdapter", "frame")
    assert {kind: found[kind] for kind in kinds} == dict.fromkeys(kinds, 0)


def test_a_connection_that_its_client_resets_is_forgotten(enduring: Live) -> None:
    """And not as long as an idle one may stay open."""
    body = json.dumps(request()).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    before = set(enduring.server.server_state.connections)
    with socket.create_connection((enduring.http.base_url.host, enduring.http.base_url.port), PATIENCE) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        (kept,) = map(weakref.ref, enduring.server.server_state.connections - before)
        wait_for(lambda: is_idle(kept()))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: kept() is None)
