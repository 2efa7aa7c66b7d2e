"""Errors on the wire: the one table from error to HTTP status, in OpenAI's shape."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from adapters.errors import AdapterError, AdapterNameError, AdapterRejected, StoreFull, UnknownAdapter
from server.errors import (
    ContextOverflow,
    Draining,
    EngineError,
    InvalidRequest,
    QueueFull,
    RequestError,
    ServerError,
    UnknownModel,
)

STATUS: Mapping[type[Exception], int] = {
    InvalidRequest: 400,
    ContextOverflow: 400,
    AdapterNameError: 400,
    UnknownModel: 404,
    UnknownAdapter: 404,
    AdapterRejected: 422,
    QueueFull: 429,
    EngineError: 500,
    Draining: 503,
    StoreFull: 507,
}
"""Error -> HTTP status. What is not here is our own fault: 500."""

RETRY_AFTER: Mapping[int, str] = {429: "1", 503: "5"}
"""Status -> when to come again, in seconds."""

LONGEST_ECHO = 80
"""Characters of a caller's key that are told back to it."""

PARAMS: Mapping[type[Exception], str] = {AdapterNameError: "name", AdapterRejected: "path", UnknownAdapter: "adapter"}
"""The field at fault, for errors that do not know of requests."""

CODES: Mapping[type[Exception], str] = {
    AdapterNameError: "invalid_adapter_name",
    AdapterRejected: "adapter_rejected",
    UnknownAdapter: "adapter_not_found",
    StoreFull: "store_full",
}


class Json(JSONResponse):
    """JSON in plain ASCII: what a caller sent, stray surrogates included, can be told back to it."""

    def render(self, content: Any) -> bytes:
        """Compact UTF-8."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def envelope(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for an error raised on purpose."""
    status = STATUS.get(type(error), 500)
    param, code = PARAMS.get(type(error)), CODES.get(type(error))
    if isinstance(error, RequestError):
        param, code = error.param, error.code
    return status, envelope(status, str(error), param, code)


def install(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""
    app.add_exception_handler(ServerError, _on_purpose)
    app.add_exception_handler(AdapterError, _on_purpose)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


def _respond(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Json:
    retry = {"retry-after": RETRY_AFTER[status]} if status in RETRY_AFTER else {}
    return Json(body, status, {**(headers or {}), **retry})


async def _on_purpose(request: Request, error: Exception) -> Json:
    return _respond(*error_body(error))


async def _http(request: Request, error: Exception) -> Json:
    """What the framework raises: no such route or method, a body that is too large or no JSON."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"There is no {request.method} {request.url.path} here.",
        405: f"{request.method} is not allowed on {request.url.path}.",
        413: "The request body is too large.",
    }.get(error.status_code, str(error.detail))
    return _respond(error.status_code, envelope(error.status_code, message), error.headers)


async def _invalid(request: Request, error: Exception) -> Json:
    """The first thing that is wrong with the request's fields."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part)[:LONGEST_ECHO] for part in first["loc"][1:]]
    message, code = first["msg"], None
    match first["type"]:
        case "json_invalid":
            message, place = f"The body is not valid JSON: {first['ctx']['error']} at {place[0]}.", []
        case "missing" if not place:
            message = "The body is empty."
        case "model_type" | "model_attributes_type" if not place:
            message = "The body must be a JSON object, sent with `Content-Type: application/json`."
        case "unserved":
            place, code = [*place, first["ctx"]["field"]], "unsupported_parameter"
        case "unknown":
            place = [*place, str(first["ctx"]["field"])[:LONGEST_ECHO]]
            message, code = f"Unknown field `{'.'.join(place)}`.", "unknown_parameter"
        case _:
            message = f"{message.removeprefix('Value error, ')} (in `{'.'.join(place)}`)."
    return _respond(400, envelope(400, message, ".".join(place) or None, code))
