"""Bind the server's address, before the base is loaded."""

import errno
import socket

from bases.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
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
        listener = socket.socket(family, kind, protocol)
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
