"""Connections: how many are open, in all and by address, and how many may be.

Every connection takes one of the files that a process may have open (``ulimit -n``). Without a limit below that, a
client that opens enough of them leaves none for the registry and the store, and for accepting others. Up to
:data:`SPARE` connections above a limit are accepted, so that their clients get a 503 and probes an answer; further
ones are closed at once.
"""

import fcntl
import logging
import socket
import termios
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from time import monotonic
from typing import Any

from bases import machine
from bases.errors import ConfigError
from server.config import Settings

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 4096
"""Connections in all, where as many files may be open."""
OTHER_FILES = 256
"""Files of the registry, the store, uploads, workers and libraries; half of all files if that is less."""
SPARE = 64
"""Connections above a limit that are accepted to be told so."""
LOG_SECONDS = 60.0
"""Pause between two lines in the log that connections were refused."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections may be open."""

    total: int
    per_address: int | None
    """From one IPv4 address, or one network of 64 bits of IPv6; None if there is no limit."""
    loopback: bool
    """Whether ``per_address`` also holds for addresses of this machine, where a proxy may run."""


def connection_limits(settings: Settings, files: int | None = None) -> ConnectionLimits:
    """Return the limits that ``settings`` ask for. ``files``: how many this process may have open; None finds out.

    Raises ConfigError if fewer files than ``--max-connections`` and others needs may be open.
    """
    files = machine.open_files() if files is None else files
    most = max(1, files - SPARE - min(OTHER_FILES, files // 2))
    if settings.max_connections is not None and settings.max_connections > most:
        raise ConfigError(
            f"--max-connections: must be at most {most}, for this process may have {files} files open, and needs some "
            f"for other purposes; raise that with `ulimit -n` (got {settings.max_connections})"
        )
    total = settings.max_connections or min(DEFAULT_LIMIT, most)
    given = settings.max_connections_per_address
    # Half, so that no single address can keep all others out. A proxy on another machine is one address, too.
    return ConnectionLimits(total, given or max(1, total // 2), loopback=given is not None)


class Connection(socket.socket):
    """An accepted connection, counted until it is closed. Knows how much of what was sent its client has taken."""

    refusal: str | None = None
    """Why its requests are refused, if they are."""
    address: str
    """The address or network by which it is counted."""
    descriptor: int
    _connections: "Connections | None" = None
    _sent = 0

    def send(self, *arguments: Any) -> int:
        """As in ``socket``."""
        sent = super().send(*arguments)
        self._sent += sent
        return sent

    def sendmsg(self, *arguments: Any) -> int:
        """As in ``socket``."""
        sent = super().sendmsg(*arguments)
        self._sent += sent
        return sent

    def taken(self) -> tuple[int, int]:
        """Return how many bytes the client has acknowledged, and how many the kernel still keeps for it.

        A client that does not read fills its receive buffer, and then acknowledges nothing more.
        """
        waiting = array("i", [0])
        fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, waiting)
        return self._sent - waiting[0], waiting[0]

    def close(self) -> None:
        """As in ``socket``."""
        super().close()
        if self._connections is not None:
            self._connections.remove(self)
            self._connections = None


class Connections:
    """The open connections of a server. For one thread."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.refused = 0
        """Number of connections refused or closed since the start, because there were too many."""
        self._open: dict[int, Connection] = {}
        """By file descriptor."""
        self._by_address: Counter[str] = Counter()
        self._logged = -LOG_SECONDS

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._open.values())

    def find(self, descriptor: int) -> Connection | None:
        """Return the open connection with this file descriptor."""
        return self._open.get(descriptor)

    def add(self, accepted: socket.socket, host: str) -> Connection | None:
        """Take over an accepted connection from ``host``; None if it was closed, because there are too many."""
        address = _counted_as(host)
        refusal, spare = self._refusal(address)
        if refusal is not None:
            self._refuse(refusal)
            if not spare:
                accepted.close()
                return None
        connection = Connection(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        connection.refusal = refusal
        connection.address = address
        connection.descriptor = connection.fileno()
        connection._connections = self
        self._open[connection.descriptor] = connection
        self._by_address[address] += 1
        return connection

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has been closed."""
        del self._open[connection.descriptor]
        self._by_address[connection.address] -= 1
        if not self._by_address[connection.address]:
            del self._by_address[connection.address]

    def _refusal(self, address: str) -> tuple[str | None, bool]:
        """Why a connection from ``address`` is one too many, or None; and whether it may be told so."""
        few = len(self) < self.limits.total + SPARE
        if len(self) >= self.limits.total:
            return f"The server has {self.limits.total} connections, its limit.", few
        limit = self._limit_of(address)
        if limit is not None and (count := self._by_address[address]) >= limit:
            return f"There are {limit} connections from {address}, the limit for one address.", count < limit + SPARE
        return None, True

    def _limit_of(self, address: str) -> int | None:
        return self.limits.per_address if self.limits.loopback or not _is_loopback(address) else None

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        now = monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            log.warning("Connections are refused, %d so far: %s", self.refused, reason)


@lru_cache(4096)
def _counted_as(host: str) -> str:
    """Return what a host's connections are counted by. One customer has at least 64 bits of IPv6 addresses."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address):
        if (mapped := address.ipv4_mapped) is not None:
            return str(mapped)
        return str(address) if address.is_loopback else str(ip_network((address, 64), strict=False))
    assert isinstance(address, IPv4Address)
    return str(address)


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
