"""Describes errors of files, JSON, aiohttp and servers for users. Each text follows the name of what it is about."""

import errno
import json
from collections.abc import Mapping

import aiohttp

SHOWN = 300
"""Longest text of a server that is shown, in characters."""
_FILE_ERRORS: Mapping[int | None, str] = {
    errno.ENOENT: "there is no such file",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "there is no such file: part of its path is a file, not a folder",
    errno.EACCES: "may not be read by this user",
}


def shortened(text: str, most: int = SHOWN) -> str:
    """Return at most ``most`` characters of a text, with dots for the rest."""
    return text if len(text) <= most else f"{text[:most]}..."


def file_error(error: OSError) -> str:
    """Return why a file could not be read."""
    return _FILE_ERRORS.get(error.errno, f"cannot be read: {error.strerror or error}")


def json_error(error: ValueError | RecursionError) -> str:
    """Return why a text is not JSON."""
    match error:
        case json.JSONDecodeError():
            return f"is not JSON, or is cut short: line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return "is not JSON: it is not UTF-8 text"
        case RecursionError():
            return "is nested too deeply"
    return f"is not JSON: {error}"


def connection_error(error: BaseException) -> str:
    """Return why a server gave no answer."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "the host name cannot be resolved"
        case aiohttp.ClientConnectorCertificateError():
            return "its certificate is not trusted"
        case aiohttp.ClientSSLError():
            return "it does not speak HTTPS"
        case aiohttp.ClientConnectorError() if error.os_error.errno == errno.ECONNREFUSED:
            return "connection refused: no server listens there"
        case aiohttp.ClientConnectorError():
            return f"cannot connect: {error.os_error.strerror or error.os_error}"
        case aiohttp.ConnectionTimeoutError():
            return "connecting timed out"
        case TimeoutError():
            return "the answer timed out"
        case aiohttp.TooManyRedirects() | aiohttp.InvalidURL():
            return "it redirects too often, or to an invalid address"
        case aiohttp.ClientResponseError():
            return "it does not speak HTTP"
        case aiohttp.ClientError() | ConnectionError():
            return "the connection was closed before the answer was complete"
    return str(error) or type(error).__name__


def server_message(body: str) -> str:
    """Return the message in an error response: OpenAI's, FastAPI's or plain text; empty for an HTML page."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return "" if body.lstrip().startswith("<") else shortened(" ".join(body.split()))
    said = answer.get("error", answer.get("message", answer.get("detail"))) if isinstance(answer, dict) else None
    if isinstance(said, dict):
        said = said.get("message")
    return shortened(said if isinstance(said, str) else " ".join(body.split()))


def status_error(status: int, body: str) -> str:
    """Return a status with its message, as ``status 404: The model `x` does not exist.``."""
    said = server_message(body)
    return f"status {status}: {said}" if said else f"status {status}"
