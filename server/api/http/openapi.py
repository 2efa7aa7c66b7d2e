"""The document of the API, ``/openapi.json``: what FastAPI finds out by itself, set right, and what it cannot know."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.schemas import responses
from server.api.schemas.registry import AdapterUpload
from server.api.schemas.responses import ErrorAnswer, ResponseModel

Responses = dict[int | str, dict[str, Any]]
"""HTTP status -> its description, as a route declares it."""

DESCRIPTION = """OpenAI's completions, chat completions and models, served from one frozen base with many LoRA adapters;
and the registry of those adapters.

A name that stands in a path may have slashes in it, as they are: `/v1/adapters/team/blue`. Every answer carries
`x-request-id`: the caller's own, where the request has one, else one of the server's."""

ERROR_DESCRIPTIONS: Mapping[int, str] = {
    400: "The request is wrong; `param` names the field.",
    404: "There is no such model, adapter or alias.",
    408: "The upload takes too long.",
    409: "Something else stands in the way: a name, an alias, an active version, pins.",
    412: "The name is not what it was when the caller looked; see `If-Match`.",
    413: "The body is too large.",
    415: "The body is of a kind that is not taken here.",
    422: "The adapter cannot be served correctly; `file` and `tensor` say where.",
    429: "Too many wait already; try again later.",
    500: "The fault is the server's; its log has more.",
    503: "The server is about to end, or its registry cannot be reached; try again later.",
    507: "There is no room for the adapter's bytes.",
}
RETRY = {"Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "string"}}}
NO_RETRY = {
    "x-should-retry": {
        "description": "Tells OpenAI's clients not to try again.",
        "schema": {"type": "string", "const": "false"},
    }
}
ETAG_HEADER = {
    "ETag": {
        "description": "The state of the name that the answer shows, for `If-Match` of a later change.",
        "schema": {"type": "string", "examples": ['"7"']},
    }
}
ADAPTER_HEADER = {
    "x-manylora-adapter": {
        "description": "`name@version=content`, separated by `;`, of each adapter that took part, if any did.",
        "schema": {"type": "string"},
    }
}
REQUEST_ID = {
    "x-request-id": {"description": "The request's id, as in the server's log.", "schema": {"type": "string"}}
}

_FASTAPIS = {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}


def returns(
    model: type[ResponseModel],
    *statuses: int,
    headers: Mapping[str, Any] | None = None,
    chunk: type[ResponseModel] | None = None,
) -> Responses:
    """JSON of ``model``, with any of ``statuses`` (200 where there are none); or events of ``chunk``, streamed."""
    content = {"application/json": {"schema": schema_ref(model)}}
    if chunk is not None:
        content["text/event-stream"] = {"schema": _stream(chunk)}
    description = str(model.__doc__)
    return {
        status: {"description": description, "content": content, "headers": dict(headers or {})}
        for status in statuses or (200,)
    }


def error_statuses(*statuses: int, model: type[ResponseModel] = ErrorAnswer) -> Responses:
    """An error with any of ``statuses``."""
    retry = {429: RETRY, 503: RETRY, 409: NO_RETRY, 507: NO_RETRY}
    return {
        status: {
            "description": ERROR_DESCRIPTIONS[status],
            "content": {"application/json": {"schema": schema_ref(model)}},
            "headers": retry.get(status, {}),
        }
        for status in statuses
    }


def schema_ref(model: type[BaseModel]) -> dict[str, Any]:
    """Where the document has the schema of ``model``."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _stream(chunk: type[ResponseModel]) -> dict[str, Any]:
    return {
        "type": "string",
        "description": f"Server-sent events: `data: ` and a `{chunk.__name__}` each; the last is `data: [DONE]`. Where "
        "something goes wrong on the way, an `ErrorAnswer` is the last.",
        "contentMediaType": "text/event-stream",
        "contentSchema": {"anyOf": [schema_ref(chunk), schema_ref(ErrorAnswer)]},
    }


def install_document(app: FastAPI) -> None:
    """Let ``app`` answer with this document, made when it is first asked for."""
    app.openapi = cache(lambda: _document(app))  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(
        title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=app.openapi_tags
    )
    for path in found["paths"].values():
        for operation in path.values():
            _correct(operation["responses"])
    schemas = found["components"]["schemas"]
    # FastAPI's own errors, which nobody gets here.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas.update(_schemas())
    return found


def _correct(responses: dict[str, Any]) -> None:
    """FastAPI takes it that bad input is answered 422; and it cannot know what all routes have in common."""
    if _FASTAPIS in responses.get("422", {}).get("content", {}).values():
        del responses["422"]
    for status, described in error_statuses(500).items():
        responses.setdefault(str(status), described)
    for response in responses.values():
        response["headers"] = response.get("headers", {}) | REQUEST_ID


def _schemas() -> dict[str, Any]:
    """By name: of the form, which FastAPI does not see, and of answers, but not of what those are only derived from."""
    named = [each for each in vars(responses).values() if isinstance(each, type) and issubclass(each, ResponseModel)]
    models = [model for model in named if not model.__subclasses__()]
    _, schemas = models_json_schema(
        [(AdapterUpload, "validation"), *((model, "serialization") for model in models)],
        ref_template="#/components/schemas/{model}",
    )
    definitions: dict[str, Any] = schemas["$defs"]
    return definitions
