"""How many connections may be open, and how they are counted."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from bases.errors import ConfigError
from server.config import Settings
from server.connections import SPARE, ConnectionLimits, Connections, connection_limits
from tests.api.live import wait_for


def settings(tmp_path: Path, **changes: int) -> Settings:
    return Settings(data_dir=tmp_path, **changes)


@pytest.mark.parametrize(
    ("files", "total"),
    [(65536, 4096), (1024, 1024 - SPARE - 256), (300, 300 - SPARE - 150), (10, 1)],
)
def test_connections_leave_files_for_the_rest(tmp_path: Path, files: int, total: int) -> None:
    limits = connection_limits(settings(tmp_path), files)
    assert limits == ConnectionLimits(total, max(1, total // 2), loopback=False)


def test_limits_that_are_given(tmp_path: Path) -> None:
    limits = connection_limits(settings(tmp_path, max_connections=500, max_connections_per_address=7), 1024)
    assert limits == ConnectionLimits(500, 7, loopback=True)


def test_more_connections_than_files_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--max-connections: must be at most 704, .* `ulimit -n` \(got 705\)$"):
        connection_limits(settings(tmp_path, max_connections=705), 1024)


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def accept(connections: Connections, host: str, stack: ExitStack) -> str | None:
    """Count a connection from ``host``; return whether it is served, refused or closed."""
    ours, accepted = socket.socketpair()
    stack.enter_context(ours)
    found = connections.add(accepted, host)
    if found is None:
        assert accepted.fileno() == -1
        return None
    stack.enter_context(found)
    return found.refusal or "served"


@pytest.mark.parametrize(
    ("hosts", "same"),
    [
        (("192.0.2.1", "192.0.2.1"), True),
        (("192.0.2.1", "192.0.2.2"), False),
        (("192.0.2.1", "::ffff:192.0.2.1"), True),
        (("2001:db8::1", "2001:db8::ffff:2"), True),
        (("2001:db8::1", "2001:db8:0:1::1"), False),
        (("fe80::1%eth0", "fe80::2"), True),
    ],
)
def test_an_address_is_one_of_ipv4_or_a_network_of_ipv6(sockets: ExitStack, hosts: tuple[str, str], same: bool) -> None:
    connections = Connections(ConnectionLimits(10, 1, loopback=False))
    assert accept(connections, hosts[0], sockets) == "served"
    assert (accept(connections, hosts[1], sockets) != "served") == same


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_a_proxy_on_this_machine_is_not_limited_unless_asked(sockets: ExitStack, host: str) -> None:
    free = Connections(ConnectionLimits(10, 1, loopback=False))
    assert [accept(free, host, sockets) for _ in range(3)] == ["served"] * 3
    limited = Connections(ConnectionLimits(10, 1, loopback=True))
    accept(limited, host, sockets)
    assert accept(limited, host, sockets) != "served"


def test_a_closed_connection_no_longer_counts(sockets: ExitStack) -> None:
    connections = Connections(ConnectionLimits(1, None, loopback=False))
    ours, accepted = socket.socketpair()
    sockets.enter_context(ours)
    first = connections.add(accepted, "192.0.2.1")
    assert first is not None
    assert connections.find(first.fileno()) is first
    refusal = accept(connections, "192.0.2.2", sockets)
    assert refusal == "The server has 1 connections, its limit."
    descriptor = first.fileno()
    first.close()
    first.close()  # asyncio may, too
    assert connections.find(descriptor) is None
    assert len(connections) == 1  # the refused one


def test_above_the_spare_ones_they_are_closed(sockets: ExitStack) -> None:
    connections = Connections(ConnectionLimits(2, None, loopback=False))
    found = [accept(connections, "192.0.2.1", sockets) for _ in range(2 + SPARE + 3)]
    assert found.count("served") == 2
    assert found[-3:] == [None] * 3
    assert len(connections) == 2 + SPARE
    assert connections.refused == SPARE + 3


def test_what_a_client_has_taken(sockets: ExitStack) -> None:
    listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = sockets.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(listener.getsockname())
    accepted, _ = listener.accept()
    connection = Connections(ConnectionLimits(1, None, loopback=False)).add(accepted, "127.0.0.1")
    assert connection is not None
    sockets.enter_context(connection)
    assert connection.taken() == (0, 0)
    assert connection.send(b"x" * 100) == connection.sendmsg([b"y" * 100]) == 100
    assert client.recv(200, socket.MSG_WAITALL)
    wait_for(lambda: connection.taken() == (200, 0))
    connection.setblocking(False)
    sent = 200
    with suppress(BlockingIOError):
        while True:
            sent += connection.send(b"z" * 65536)
    wait_for(lambda: sum(connection.taken()) == sent)
    taken, waiting = connection.taken()
    assert waiting > 0
    wait_for(lambda: client.recv(4096) and connection.taken()[0] > taken)
