"""Take the address before anything slow begins."""

import errno
import socket

from bases.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address, not listening yet. Raises ConfigError where that cannot be.

    With SO_REUSEADDR, two servers may bind one port as long as neither listens, and the second learns of the first
    after it has loaded its base. So it is bound without; where that fails, with: for a minute after a server has ended,
    what is left of its connections keeps the port from being bound in any other way.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name: an empty or a very long part
        reason = error.strerror if isinstance(error, OSError) else "it cannot be the name of a machine"
        raise ConfigError(f"--host: {host!r} is no address of this machine: {reason}") from error
    for reuse in (0, 1):
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            listener.bind(address)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or reuse:
                reason = f"{error.strerror}; --port takes another, 0 any free one"
                raise ConfigError(f"--port: cannot listen on {host} port {port}: {reason}") from error
        else:
            break
    return listener
