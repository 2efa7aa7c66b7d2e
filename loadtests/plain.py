"""What libraries say of bad input, in plain words; each is the end of a sentence that begins with what it is about."""

import errno
import json
from collections.abc import Mapping
from typing import Any

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


def of_value(detail: Mapping[str, Any]) -> str:
    """What pydantic found wrong with a value, without the value."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return "is missing"
        case "value_error":
            return str(context["error"])
        case "greater_than_equal":
            return f"must be at least {context['ge']:,}"
        case "greater_than":
            return f"must be more than {context['gt']:,}"
        case "less_than_equal":
            return f"must be at most {context['le']:,}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "must be a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return "must be a finite number"
        case "string_too_short" | "too_short":
            return "must not be empty"
        case "string_type":
            return "must be a text"
        case "list_type":
            return "must be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a JSON object"
        case "json_invalid":
            return "is not JSON"
    return str(detail["msg"])


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
