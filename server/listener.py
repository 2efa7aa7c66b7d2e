"""Listener: bind the server's address, before the base is loaded, and accept connections within their limits."""

import errno
import ipaddress
import socket
from typing import Any

from bases.errors import ConfigError
from server.connections import Connections

NO_KEYS = (
    "--host: other machines reach {host}, and there are no API keys: everybody could use and change this server. Make "
    "a key with `manylora keys add NAME --scope admin`, give keys with --api-key-file, or start with --allow-anonymous"
)
"""Why a server does not start, as a format string."""


class Listener(socket.socket):
    """A listening socket whose connections are counted."""

    connections: Connections | None = None
    """Where they are counted; None accepts all."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection and its address. Raises BlockingIOError for one that was refused, too.

        asyncio then looks at everything else before it accepts again, so a flood of connections cannot take all of the
        event loop's time.
        """
        accepted, address = super().accept()
        if self.connections is None:
            return accepted, address
        connection = self.connections.add(accepted, address[0])
        if connection is None:
            raise BlockingIOError(errno.EAGAIN, "The connection was refused: there are too many")
        return connection, address


def bind(host: str, port: int) -> Listener:
    """Return a socket that is bound to the address but does not listen yet. Raises ConfigError if that fails.

    First without SO_REUSEADDR: with it, two servers could bind the same port as long as neither listens, and the second
    would fail only after it has loaded its base. Then with it: for about a minute after a server has ended, its
    connections in TIME_WAIT keep the port from being bound without it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty or very long part of a name
        reason = error.strerror if isinstance(error, OSError) else "it is not a valid host name"
        raise ConfigError(f"--host: {host!r} is not an address of this machine: {reason}") from error
    for reuse in (0, 1):
        listener = Listener(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            listener.bind(address)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or reuse:
                reason = f"{error.strerror}; give another port, or 0 for any free one"
                raise ConfigError(f"--port: cannot listen on {host} port {port}: {reason}") from error
        else:
            break
    return listener


def is_local(listener: socket.socket) -> bool:
    """Return whether only programs on this machine reach the address of a bound socket."""
    return _is_loopback(listener.getsockname()[0])


def is_local_name(host: str) -> bool:
    """Return whether :func:`bind` takes an address for ``host`` that only programs on this machine reach."""
    return _is_loopback(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])


def _is_loopback(host: str | int) -> bool:
    address = ipaddress.ip_address(str(host).partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return bool((mapped or address).is_loopback)
