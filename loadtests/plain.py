"""What libraries say of bad input, in plain words; each is the end of a sentence that begins with what it is about."""

import errno
import json
from collections.abc import Mapping

import aiohttp

SHOWN = 300
"""Characters of somebody else's text that are told."""
_FILE_ERRORS: Mapping[int | None, str] = {
    errno.ENOENT: "there is no such file",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "there is no such file: part of its path is a file, not a folder",
    errno.EACCES: "may not be read by this user",
}


def shortened(text: str, most: int = SHOWN) -> str:
    """At most so many characters of it."""
    return text if len(text) <= most else f"{text[:most]}..."


def of_file(error: OSError) -> str:
    """Why a file could not be read."""
    return _FILE_ERRORS.get(error.errno, f"cannot be read: {error.strerror or error}")


def of_json(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON."""
    match error:
        case json.JSONDecodeError():
            return f"is not JSON, or breaks off: line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return "is not JSON: it is no text in UTF-8"
        case RecursionError():
            return "is nested too deeply"
    return f"is not JSON: {error}"


def of_connection(error: BaseException) -> str:
    """Why a server gave no answer."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "no machine of that name is known"
        case aiohttp.ClientConnectorCertificateError():
            return "its certificate is not trusted"
        case aiohttp.ClientSSLError():
            return "it does not speak HTTPS"
        case aiohttp.ClientConnectorError() if error.os_error.errno == errno.ECONNREFUSED:
            return "nothing listens there"
        case aiohttp.ClientConnectorError():
            return f"no connection: {error.os_error.strerror or error.os_error}"
        case aiohttp.ConnectionTimeoutError():
            return "the connection was not taken in time"
        case TimeoutError():
            return "no answer in time"
        case aiohttp.TooManyRedirects() | aiohttp.InvalidURL():
            return "it redirects without end, or to no address"
        case aiohttp.ClientResponseError():
            return "what answers does not speak HTTP"
        case aiohttp.ClientError() | ConnectionError():
            return "the connection broke off before the answer was whole"
    return str(error) or type(error).__name__


def of_answer(body: str) -> str:
    """The message in a server's refusal: OpenAI's, FastAPI's or plain text; of a page in HTML nothing."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return "" if body.lstrip().startswith("<") else shortened(" ".join(body.split()))
    said = answer.get("error", answer.get("message", answer.get("detail"))) if isinstance(answer, dict) else None
    if isinstance(said, dict):
        said = said.get("message")
    return shortened(said if isinstance(said, str) else " ".join(body.split()))


def of_status(status: int, body: str) -> str:
    """As in ``status 404: The model `x` does not exist.``."""
    said = of_answer(body)
    return f"status {status}: {said}" if said else f"status {status}"
