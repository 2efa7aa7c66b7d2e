"""More connections than the limits: 503 for a few, a close for the rest, and never a server without files."""

import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from server import connections
from tests.api.edge.test_slow_clients import error_of
from tests.api.edge.test_slow_readers import server_side
from tests.api.live import Live, running, tiny_service, wait_for
from tests.api.operation.test_http import connected, read_all
from tests.api.registry.test_kill import Zygote

GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIMIT = 6
FROM_ONE = 3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    service = tiny_service(
        tmp_path_factory.mktemp("small"), max_connections=LIMIT, max_connections_per_address=FROM_ONE
    )
    with running(service) as live:
        yield live


@pytest.fixture
def clients(small: Live) -> Iterator[ExitStack]:
    """Where a test keeps its connections. The fixtures' own client has none open."""
    small.http.close()
    wait_for(lambda: len(small.server.connections) == 0)
    with ExitStack() as stack:
        yield stack
    wait_for(lambda: len(small.server.connections) == 0)


def refused_so_far(live: Live) -> float:
    """Return what the metrics say."""
    (line,) = re.findall(r"^manylora_connections_refused_total (.+)$", live.service.metrics.render()[0].decode(), re.M)
    return float(line)


def connect(live: Live, clients: ExitStack, source: str = "127.0.0.1") -> socket.socket:
    """Open a connection from an address of this machine, and wait until the server has seen it."""
    address = (live.http.base_url.host, live.http.base_url.port)
    client = clients.enter_context(socket.create_connection(address, 60, source_address=(source, 0)))
    wait_for(lambda: server_side(live, client))
    return client


def ask(client: socket.socket, path: bytes = b"/v1/models") -> bytes:
    """Return the response to a request: all of it if the connection is then closed."""
    client.sendall(GET % path)
    head = client.recv(65536)
    return head + (read_all(client) if b"connection: close" in head else b"")


def test_one_address_cannot_take_all_connections(small: Live, clients: ExitStack) -> None:
    before = refused_so_far(small)
    own = [connect(small, clients) for _ in range(FROM_ONE)]
    assert f"manylora_connections_open {float(FROM_ONE)}" in small.service.metrics.render()[0].decode()
    status, error = error_of(ask(connect(small, clients)))
    assert refused_so_far(small) == before + 1
    assert (status, error["code"]) == (503, "too_many_connections")
    assert error["message"] == f"There are {FROM_ONE} connections from 127.0.0.1, the limit for one address."
    assert ask(connect(small, clients, "127.0.0.2")).startswith(b"HTTP/1.1 200 ")
    assert ask(own[0]).startswith(b"HTTP/1.1 200 ")


def test_there_is_room_again_when_one_has_closed(small: Live, clients: ExitStack) -> None:
    own = [connect(small, clients) for _ in range(FROM_ONE)]
    assert ask(connect(small, clients)).startswith(b"HTTP/1.1 503 ")
    own[0].close()
    wait_for(lambda: len(small.server.connections) <= FROM_ONE - 1)
    assert ask(connect(small, clients)).startswith(b"HTTP/1.1 200 ")


def test_all_connections_are_limited_but_probes_are_answered(small: Live, clients: ExitStack) -> None:
    for number in range(LIMIT):
        connect(small, clients, f"127.0.1.{number + 1}")
    refused = ask(connect(small, clients, "127.0.2.1"))
    status, error = error_of(refused)
    assert (status, error["message"]) == (503, f"The server has {LIMIT} connections, its limit.")
    assert b"retry-after: 5" in refused
    for path in (b"/livez", b"/readyz", b"/health", b"/metrics"):
        probe = connect(small, clients, "127.0.2.1")
        assert ask(probe, path).startswith(b"HTTP/1.1 200 ")
        while probe.recv(65536):  # such a connection has one response
            pass


def test_beyond_the_spare_ones_they_are_closed_at_once(
    small: Live, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SPARE", 1)
    for number in range(LIMIT + 1):
        connect(small, clients, f"127.0.1.{number + 1}")
    for _ in range(20):
        with connected(small) as client:
            try:
                assert read_all(client) == b""
            except ConnectionResetError:
                continue


def test_a_refused_connection_without_a_request_is_closed_soon(
    small: Live, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.protocol.client.REFUSED_SECONDS", 0.2)
    for _ in range(FROM_ONE):
        connect(small, clients)
    assert read_all(connect(small, clients)) == b""


@pytest.mark.slow
def test_a_flood_leaves_files_for_everything_else(tmp_path: Path, folders: dict[str, Path]) -> None:
    """With 200 files for the process, 400 connections are opened, from many addresses."""
    zygote = Zygote()
    try:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.prlimit(zygote._process.pid, resource.RLIMIT_NOFILE, (200, most))
        with zygote.server(tmp_path) as client, ExitStack() as flood:
            assert client.get("/v1/models").status_code == 200
            address = (client.base_url.host, client.base_url.port)
            for number in range(400):
                source = (f"127.0.3.{number % 200 + 1}", 0)
                flood.enter_context(socket.create_connection(address, 60, source_address=source))
            form = [("file", (file.name, file.read_bytes())) for file in folders["spare"].iterdir()]
            assert client.post("/v1/adapters", data={"name": "new"}, files=form).status_code == 201
            completion = client.post("/v1/completions", json={"prompt": "x", "adapter": "new"})
            assert completion.status_code == 200
            assert len(list(Path(f"/proc/{zygote.pid}/fd").iterdir())) < 200
            with pytest.raises(httpx.HTTPError), httpx.Client(base_url=client.base_url) as late:
                late.get("/v1/models")
            flood.close()
            wait_for(lambda: httpx.get(f"{client.base_url}/v1/models").status_code == 200)
    finally:
        zygote.close()
