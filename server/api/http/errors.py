"""Convert exceptions to HTTP responses in OpenAI's error format. The only table of statuses is here."""

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNameError,
    AdapterRejected,
    AdapterUnavailable,
    QuotaExceeded,
    RegistryUnavailable,
    RevisionMismatch,
    SourceRefused,
    StoreFull,
    UnknownAdapter,
)
from server.api.http.anthropic_errors import anthropic_error, speaks_anthropic
from server.api.http.body_limits import BodyRefused
from server.api.http.json_body import MalformedBody
from server.api.http.near_names import suggestion
from server.api.http.paths import allowed_methods
from server.api.http.unserved import not_found_message
from server.errors import (
    ContextOverflow,
    DeadlineExceeded,
    Draining,
    EngineError,
    Forbidden,
    GrammarTooComplex,
    InvalidRequest,
    KeyConflict,
    OutOfMemory,
    PoisonedRequest,
    QueueFull,
    QuotaUsedUp,
    RateLimited,
    RequestError,
    ServerError,
    UnknownKey,
    UnknownModel,
    UnknownRun,
    UploadTooLarge,
)


class InvalidAdapter(RequestError):
    """A rejected adapter, with the request field that named or contained it."""

    def __init__(self, error: AdapterRejected, param: str) -> None:
        super().__init__(str(error), param=param, code=error.code)
        self.file = error.file
        self.tensor = error.tensor


STATUS: Mapping[type[Exception], int] = {
    RequestValidationError: 400,
    InvalidRequest: 400,
    ContextOverflow: 400,
    GrammarTooComplex: 400,
    AdapterNameError: 400,
    SourceRefused: 400,
    Forbidden: 403,
    UnknownModel: 404,
    UnknownKey: 404,
    UnknownRun: 404,
    UnknownAdapter: 404,
    AdapterConflict: 409,
    KeyConflict: 409,
    RevisionMismatch: 412,
    UploadTooLarge: 413,
    AdapterRejected: 422,
    AdapterUnavailable: 422,
    InvalidAdapter: 422,
    QueueFull: 429,
    RateLimited: 429,
    QuotaUsedUp: 429,
    ClientDisconnect: 499,  # for logs and metrics only: the client is gone
    EngineError: 500,
    PoisonedRequest: 500,
    OutOfMemory: 503,
    Draining: 503,
    RegistryUnavailable: 503,
    DeadlineExceeded: 504,
    StoreFull: 507,
    QuotaExceeded: 507,
}
"""Exception class -> HTTP status. Any other exception is a bug in the server and gets 500."""

RETRY_AFTER: Mapping[int, str] = {429: "1", 503: "5"}
"""Status -> seconds to wait before a retry, where the error does not say."""

NO_RETRY = (409, 504, 507)
"""Statuses that OpenAI's clients would retry, although it is too late or somebody must change something first."""

MAX_ECHO = 80
"""Maximum number of characters of a client's key that an error message repeats."""

PARAMS: Mapping[type[Exception], str] = {
    AdapterNameError: "name",
    SourceRefused: "source",
    UnknownAdapter: "adapter",
    AdapterUnavailable: "adapter",
    RevisionMismatch: "If-Match",
}
"""Exception class -> request field at fault, for exceptions that do not carry one."""

CODES: Mapping[type[Exception], str] = {
    AdapterNameError: "invalid_adapter_name",
    SourceRefused: "source_refused",
    UnknownAdapter: "adapter_not_found",
    AdapterUnavailable: "adapter_unavailable",
    RevisionMismatch: "revision_mismatch",
    RegistryUnavailable: "registry_unavailable",
    StoreFull: "store_full",
    QuotaExceeded: "quota_exceeded",
    PoisonedRequest: "poisoned_request",
    OutOfMemory: "out_of_memory",
}


class JsonResponse(JSONResponse):
    """A JSON response in ASCII, so that it can repeat any text of a client, lone surrogates included."""

    def render(self, content: Any) -> bytes:
        """Return ``content`` as compact JSON."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: Exception) -> int:
    """Return the HTTP status for ``error``."""
    return error.status_code if isinstance(error, HTTPException) else STATUS.get(type(error), 500)


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and body for an exception that the server raises deliberately."""
    status = status_of(error)
    param, code = PARAMS.get(type(error)), CODES.get(type(error))
    if isinstance(error, RequestError):
        param, code = error.param, error.code
    elif isinstance(error, AdapterConflict | AdapterRejected):
        code = error.code
    body = error_object(status, str(error), param, code)
    if isinstance(error, InvalidAdapter | AdapterRejected):
        body["error"] |= {"file": error.file, "tensor": error.tensor}
    if isinstance(error, QuotaUsedUp):
        body["error"]["type"] = error.code  # as at OpenAI
    return status, body


def error_response(error: Exception, path: str, hint: str = "") -> JsonResponse:
    """Return the response to an exception that the server raises deliberately, for a request of ``path``.

    ``hint`` is added to its message.
    """
    status, body = error_body(error)
    body["error"]["message"] += hint
    return respond(status, body, retry=_retry_headers(error), path=path)


def install_handlers(app: FastAPI) -> None:
    """Make ``app`` respond to all errors in OpenAI's format."""
    app.add_exception_handler(ServerError, _expected)
    app.add_exception_handler(AdapterError, _expected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _disconnected)


def respond(
    status: int,
    body: dict[str, Any],
    headers: Mapping[str, str] | None = None,
    *,
    retry: Mapping[str, str] | None = None,
    path: str = "",
) -> JsonResponse:
    """Return an error response, with the headers that say whether clients should retry: ``retry``, or its status's.

    ``body`` is in OpenAI's format. The routes of another API, by their ``path``, answer in its format.
    """
    if speaks_anthropic(path):
        body = anthropic_error(status, body)
    if retry is None:
        retry = {"retry-after": RETRY_AFTER[status]} if status in RETRY_AFTER else {}
        if status in NO_RETRY:
            retry = {**retry, "x-should-retry": "false"}
    return JsonResponse(body, status, {**(headers or {}), **retry})


def _retry_headers(error: Exception) -> Mapping[str, str] | None:
    """Return the headers of an exception that says when to retry; None for those of its status."""
    if isinstance(error, PoisonedRequest):
        return {"x-should-retry": "false"}
    after = error.retry_after if isinstance(error, RequestError) else None
    if after is None and not isinstance(error, RateLimited):
        return None
    wait = {} if after is None else {"retry-after": str(math.ceil(after))}
    useless = after is None or isinstance(error, QuotaUsedUp)
    return {**wait, **({"x-should-retry": "false"} if useless else {})}


async def _expected(request: Request, error: Exception) -> JsonResponse:
    hint = suggestion(request, error) if isinstance(error, UnknownModel | UnknownAdapter) else ""
    return error_response(error, request.url.path, hint)


async def _disconnected(request: Request, error: Exception) -> JsonResponse:
    """The client disconnected while it sent the body."""
    return JsonResponse(None, status_of(error))


async def _http(request: Request, error: Exception) -> JsonResponse:
    """Errors from the framework: unknown route or method, or a body that is too large or not JSON."""
    assert isinstance(error, HTTPException)
    message, param, code, headers = str(error.detail), None, None, error.headers
    match error.status_code:
        case 404:
            message, code = not_found_message(request.scope), "unknown_url"
        case 405:
            message = f"{request.method} is not allowed on {request.url.path}."
            headers = {"allow": ", ".join(allowed_methods(request.scope))}  # Starlette lists only one route's methods
        case 400 if isinstance(error, MalformedBody):
            param = error.param
        case 503 if isinstance(error, BodyRefused):
            code = error.code
    return respond(
        error.status_code, error_object(error.status_code, message, param, code), headers, path=request.url.path
    )


async def _invalid(request: Request, error: Exception) -> JsonResponse:
    """Report the first invalid field of the request."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = _place(first, error.body)
    message, code = first["msg"], None
    match first["type"]:
        case "missing" if not place:
            message = "The body is empty."
        case "model_type" | "model_attributes_type" if not place:
            message = "The body must be a JSON object, sent with `Content-Type: application/json`."
        case "unsupported":
            place, code = [*place, first["ctx"]["field"]], "unsupported_parameter"
        case "field":
            place = [*place, first["ctx"]["field"]]
        case "unknown":
            place = [*place, str(first["ctx"]["field"])[:MAX_ECHO]]
            nearest = first["ctx"].get("nearest")
            hint = f"; did you mean `{'.'.join([*place[:-1], nearest])}`?" if nearest else "."
            message, code = f"Unknown field `{'.'.join(place)}`{hint}", "unknown_parameter"
        case "extra_forbidden":  # of a TypedDict
            message, code = f"Unknown field `{'.'.join(place)}`.", "unknown_parameter"
        case _:
            message = f"{message.removeprefix('Value error, ')} (in `{'.'.join(place)}`)."
    return respond(400, error_object(400, message, ".".join(place) or None, code), path=request.url.path)


def _place(error: Mapping[str, Any], body: object) -> list[str]:
    """The path in ``body`` to what an error is about: pydantic's location without the tags of unions."""
    location = tuple(error["loc"][1:])
    inside = (error["ctx"]["field"],) if error["type"] in ("unknown", "unsupported") else ()
    found = _find((*location, *inside), body, missing=error["type"] == "missing")
    path = location if found is None else found[: len(found) - len(inside)]
    return [str(part)[:MAX_ECHO] for part in path]


def _find(location: tuple[str | int, ...], body: Any, *, missing: bool) -> list[str | int] | None:
    """The parts of ``location`` that lead through ``body``, or None if no such parts do.

    ``missing``: the last part names a field that the body lacks.
    """
    if not location:
        return []
    part, rest = location[0], location[1:]
    if isinstance(body, list) and isinstance(part, int) and part < len(body):
        found = _find(rest, body[part], missing=missing)
        return None if found is None else [part, *found]
    if not isinstance(body, dict):
        return None
    if part in body:
        found = _find(rest, body[part], missing=missing)
        if found is not None:
            return [part, *found]
    if part in (body.get("type"), body.get("role")):
        return _find(rest, body, missing=missing)  # the tag of a union
    return [part] if missing and not rest else None
