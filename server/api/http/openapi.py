"""The OpenAPI document, ``/openapi.json``: FastAPI's own with corrections and additions."""

import json
import re
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.access.scopes import ROUTES, Access
from server.api.http.anthropic_errors import anthropic_error
from server.api.http.errors import error_object
from server.api.http.examples import ERRORS, EXAMPLES
from server.api.schemas import answers, embeddings, keys, responses, score, training, usage
from server.api.schemas.anthropic import answers as anthropic_answers
from server.api.schemas.anthropic.answers import AnthropicErrorAnswer
from server.api.schemas.registry import AdapterUpload
from server.api.schemas.responses import ErrorAnswer, ResponseModel, VllmErrorAnswer
from server.api.schemas.responses_api import answers as responses_api_answers
from server.api.schemas.training import DataForm

ANSWERS = (responses, answers, embeddings, score, keys, training, usage, responses_api_answers, anthropic_answers)
"""Modules with response models."""

Responses = dict[int | str, dict[str, Any]]
"""HTTP status -> its description, as a route declares it."""

DESCRIPTION = """OpenAI-compatible completions, chat completions and models for one frozen base model with many LoRA
adapters, and the registry of those adapters.

Adapter names in paths may contain unescaped slashes: `/v1/adapters/team/blue`. Every response has an `x-request-id`
header: the request's own id if it sent one, otherwise an id made by the server.

A server that has API keys asks for one on every route but the probes, as `Authorization: Bearer KEY` or
`x-api-key: KEY`. What a key does not see does not exist for it.

Unknown fields of requests are refused. A server with `--lenient` ignores them, except in changes of the registry, and
lists them in the header `x-manylora-ignored`."""

ERROR_DESCRIPTIONS: Mapping[int, str] = {
    400: "The request is invalid; `param` names the field.",
    401: "The request has no valid API key.",
    403: "The API key does not allow this.",
    404: "There is no such model, adapter, alias, key or training run, or the API key does not see it.",
    408: "The body did not arrive in time.",
    409: "Conflict with the current state: a name, an alias, the active version or pins.",
    412: "The name has changed since the revision in `If-Match`.",
    413: "The body is too large.",
    415: "The body's content type is not supported here.",
    422: "The adapter cannot be served correctly; `file` and `tensor` say where.",
    429: "Too many requests are waiting, or a limit of the API key is reached; try again later.",
    500: "Internal error; the server's log has the details.",
    503: "The server is shutting down, or its registry cannot be reached; try again later.",
    504: "The request cannot be completed within its own timeout.",
    507: "There is not enough storage for the adapter.",
}
RETRY = {"Retry-After": {"description": "Seconds to wait before a retry.", "schema": {"type": "string"}}}
CHALLENGE = {"WWW-Authenticate": {"description": "`Bearer`.", "schema": {"type": "string"}}}
NO_RETRY = {
    "x-should-retry": {
        "description": "Prevents OpenAI's clients from retrying.",
        "schema": {"type": "string", "const": "false"},
    }
}
ETAG_HEADER = {
    "ETag": {
        "description": "Revision of the name in this response, for `If-Match` of a later change.",
        "schema": {"type": "string", "examples": ['"7"']},
    }
}
ADAPTER_HEADER = {
    "x-manylora-adapter": {
        "description": "`name@version=content` of each applied adapter, separated by `;`; an alias alone where the key "
        "does not see what it means. Absent for the base alone.",
        "schema": {"type": "string"},
    }
}
REQUEST_ID = {
    "x-request-id": {"description": "Id of the request, as in the server's log.", "schema": {"type": "string"}}
}

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_ACCESS = {re.sub(r":path(?=})", "", route): access for route, access in ROUTES.items()}
"""Method and path of a route, as the document has them -> who has access."""
_FASTAPI_ERROR = {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}


def returns(
    model: type[ResponseModel],
    *statuses: int,
    headers: Mapping[str, Any] | None = None,
    chunk: type[ResponseModel] | None = None,
    typed: bool = False,
) -> Responses:
    """Describe a JSON response of ``model`` with each of ``statuses`` (by default 200).

    ``chunk`` is the model of the events if the response can also be streamed. With ``typed``, each event names its
    type, and ``chunk`` describes errors, too.
    """
    content: dict[str, dict[str, Any]] = {"application/json": {"schema": schema_ref(model)}}
    if chunk is not None:
        content["text/event-stream"] = _typed_stream(chunk) if typed else _stream(chunk)
    description = str(model.__doc__)
    return {
        status: {"description": description, "content": content, "headers": dict(headers or {})}
        for status in statuses or (200,)
    }


def error_statuses(*statuses: int, model: type[ResponseModel] = ErrorAnswer) -> Responses:
    """Describe an error response for each of ``statuses``. A body that may be too large may also be too late."""
    retry = {401: CHALLENGE, 429: RETRY, 503: RETRY, 409: NO_RETRY, 504: NO_RETRY, 507: NO_RETRY}
    return {
        status: {
            "description": ERROR_DESCRIPTIONS[status],
            "content": {"application/json": {"schema": schema_ref(model)}},
            "headers": retry.get(status, {}),
        }
        for status in sorted({*statuses, *((408,) if 413 in statuses else ())})
    }


def schema_ref(model: type[BaseModel]) -> dict[str, Any]:
    """Return a reference to the schema of ``model`` in the document."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _stream(chunk: type[ResponseModel]) -> dict[str, Any]:
    text = (
        f"Server-sent events, each `data: ` and a `{chunk.__name__}`; the last is `data: [DONE]`. If an error occurs "
        "after the stream has begun, the last event is an `ErrorAnswer` instead."
    )
    payload = {"anyOf": [{"const": "[DONE]"}, _json({"anyOf": [schema_ref(chunk), schema_ref(ErrorAnswer)]})]}
    events = (json.dumps(EXAMPLES.get(chunk.__name__)), "[DONE]")
    return {"schema": _event(text, payload), "example": "".join(f"data: {event}\n\n" for event in events)}


def _typed_stream(chunk: type[ResponseModel]) -> dict[str, Any]:
    text = f"Server-sent events, each `event: `, its type, `data: ` and a `{chunk.__name__}`."
    event = EXAMPLES[chunk.__name__]
    example = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    return {"schema": _event(text, _json(schema_ref(chunk))), "example": example}


def _event(description: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of each event of a stream, in the way of OpenAPI 3.2: its fields, by name."""
    fields = {"data": {"type": "string", **data}, "event": {"type": "string"}}
    return {"type": "object", "description": description, "properties": fields, "required": ["data"]}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a text that is JSON of ``schema``."""
    return {"contentMediaType": "application/json", "contentSchema": schema}


def install_document(app: FastAPI) -> None:
    """Make ``app`` serve this document. It is built at the first request for it."""
    app.openapi = cache(lambda: _document(app))  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(
        title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=app.openapi_tags
    )
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _add_access(operation, _ACCESS[f"{method.upper()} {path}"])
            _correct(operation["responses"])
    found["components"]["securitySchemes"] = SECURITY_SCHEMES
    found["security"] = [*({name: []} for name in SECURITY_SCHEMES), {}]  # {}: a server may have no keys
    schemas = found["components"]["schemas"]
    # FastAPI's own validation errors: this server converts them to OpenAI's format.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas.update(_schemas())
    return found


def _add_access(operation: dict[str, Any], access: Access) -> None:
    """Describe what an operation asks of a key, and how it rejects one."""
    if access == "open":
        operation["security"] = []
        return
    asked = "Any API key has access." if access == "any" else f"API keys need the scope `{access}`."
    operation["description"] = f"{operation['description']}\n\n{asked}"
    described = json.dumps(operation["responses"])
    models = (AnthropicErrorAnswer, VllmErrorAnswer)
    model = next((each for each in models if schema_ref(each)["$ref"] in described), ErrorAnswer)
    for status, response in error_statuses(401, 403, model=model).items():
        operation["responses"].setdefault(str(status), response)


def _correct(responses: dict[str, Any]) -> None:
    """Remove FastAPI's default 422 response, and add what all routes have: status 500 and the request id."""
    if _FASTAPI_ERROR in responses.get("422", {}).get("content", {}).values():
        del responses["422"]
    for status, described in error_statuses(500).items():
        responses.setdefault(str(status), described)
    for status, response in responses.items():
        response["headers"] = response.get("headers", {}) | REQUEST_ID
        content = response["content"].get("application/json")
        if content is not None:
            # Only now: FastAPI would leave out their nulls.
            content |= _example(int(status), content["schema"])


def _example(status: int, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field with an example of a response with ``schema``; empty if there is none."""
    name = schema["$ref"].rpartition("/")[2]
    found = EXAMPLES.get(f"{name} {status}", EXAMPLES.get(name))
    if found is not None or status < 400:
        return {} if found is None else {"example": found}
    message, param, code = ERRORS[status]
    body = error_object(status, message, param, code)
    if name == ErrorAnswer.__name__:
        return {"example": body}
    if name == AnthropicErrorAnswer.__name__:
        return {"example": anthropic_error(status, body)}
    error = {"message": message, "type": HTTPStatus(status).phrase, "param": None, "code": status}
    return {"example": {"error": error}}


def _schemas() -> dict[str, Any]:
    """Return the schemas of all response models and of the upload form, by name. FastAPI knows neither."""
    found = [each for module in ANSWERS for each in vars(module).values()]
    named = {each for each in found if isinstance(each, type) and issubclass(each, ResponseModel)}
    models = sorted((model for model in named if not model.__subclasses__()), key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(AdapterUpload, "validation"), (DataForm, "validation"), *((model, "serialization") for model in models)],
        ref_template="#/components/schemas/{model}",
    )
    definitions: dict[str, Any] = schemas["$defs"]
    return definitions
