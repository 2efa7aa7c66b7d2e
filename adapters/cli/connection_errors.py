"""Explain why a server gave no answer: what happened, what it means, what to do."""

import socket
import ssl
from collections.abc import Iterator

import httpx2

_START_HINT = "start one with `manylora serve`, or check the address"
_CHECK_HINT = "the change may have been made: check before you try again"
_CHANGES_NOTHING = ("/v1/chat/completions",)
"""Paths to which a POST changes nothing."""


def no_answer(url: str, error: httpx2.RequestError) -> str:
    """Return a message about a request to ``url`` (given without its password) that got no answer."""
    return f"no answer from {url}: {_why(error)}"


def _why(error: httpx2.RequestError) -> str:
    if isinstance(error, httpx2.ConnectTimeout):
        return f"it could not be reached within {_seconds(error, 'connect')}; check the address, and that it runs"
    if isinstance(error, httpx2.ConnectError):
        return _why_no_connection(error)
    if isinstance(error, httpx2.TimeoutException):
        waited = _seconds(error, "write" if isinstance(error, httpx2.WriteTimeout) else "read")
        return f"it sent nothing for {waited}, so it is busy or hangs{_retry_hint(error)}"
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError | httpx2.WriteError):
        closed = "it closed the connection before its answer was complete, so it exited or is no HTTP server"
        return closed + _retry_hint(error)
    return f"the request could not be made ({type(error).__name__}); check the address and the proxy settings"


def _why_no_connection(error: httpx2.ConnectError) -> str:
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return f"the connection was refused, so no server runs there; {_START_HINT}"
        if isinstance(cause, socket.gaierror):
            return f"the host {error.request.url.host} is not known here; check the address"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted here ({cause.verify_message}); set SSL_CERT_FILE to a file with the "
                "certificate of its authority"
            )
        if isinstance(cause, ssl.SSLError):
            return "it does not speak HTTPS; try the address with http://"
        if isinstance(cause, OSError) and cause.strerror:
            return f"it cannot be reached ({cause.strerror}); check the address and the network"
    return f"it cannot be reached; {_START_HINT}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _seconds(error: httpx2.RequestError, which: str) -> str:
    """Return the timeout of the request that has passed, e.g. ``30 s``."""
    return f"{error.request.extensions['timeout'][which]:g} s"


def _retry_hint(error: httpx2.RequestError) -> str:
    harmless = error.request.method in ("GET", "HEAD") or error.request.url.path.endswith(_CHANGES_NOTHING)
    return "; try again later" if harmless else f"; {_CHECK_HINT}"
