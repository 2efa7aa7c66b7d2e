"""Errors of the routes under ``/v1/messages``: OpenAI's shape in Anthropic's."""

from collections.abc import Mapping
from typing import Any

ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status -> Anthropic's type of error, where it is not that of most statuses below 500 and from there on."""


def speaks_anthropic(path: str) -> bool:
    """Whether the clients of this path expect errors in Anthropic's shape."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_error(status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of an error in Anthropic's shape. OpenAI's ``param`` and ``code`` stay in it."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**body["error"], "type": kind}}
