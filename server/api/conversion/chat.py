"""Validate the chat request that another API's request was converted to, and name the other's fields in errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from server.api.schemas.chat import ChatRequest
from server.errors import RequestError


def validate_chat(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """Return the chat request with these fields.

    ``names`` maps its fields to those of the request that they come from, for errors. Raises RequestValidationError.
    """
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError([_renamed(each, names) for each in error.errors()]) from error


@contextmanager
def field_names(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the fields that errors name, as :func:`validate_chat` does."""
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            error.param = renamed(error.param, names)
        raise


def _renamed(error: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Return an error of pydantic's with the names of the other API, placed in the body as FastAPI does."""
    place, context = error["loc"], dict(error.get("ctx", {}))
    if place:
        place = (*renamed(".".join(map(str, place)), names).split("."),)
    elif "field" in context:
        context["field"] = renamed(str(context["field"]), names)
    return {**error, "loc": ("body", *place), "ctx": context}


def renamed(field: str, names: Mapping[str, str]) -> str:
    """Return a field's name, ``a.b.c``, with the longest beginning that ``names`` has replaced."""
    parts = field.split(".")
    for length in range(len(parts), 0, -1):
        if (name := names.get(".".join(parts[:length]))) is not None:
            return ".".join([name, *parts[length:]])
    return field
