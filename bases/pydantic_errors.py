"""Pydantic's validation errors in plain words, for options and for the JSON that commands read."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

_FIXED: Mapping[str, str] = {
    "missing": "is missing",
    "extra_forbidden": "there is no such option",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a finite number",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "json_invalid": "is not JSON",
}
"""Type of an error -> its message, for types whose message needs nothing from the error."""
_LIMITS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_NO_VALUE = {"missing", "extra_forbidden", "value_error"}
"""Types of errors that have no wrong value, or whose message already says which."""


def message(detail: ErrorDetails) -> str:
    """Return what is wrong, as ``must be at least 1``, to follow the field's name. Does not show the value."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _FIXED:
        return _FIXED[kind]
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"must be {words} {_number(context[key])}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected']}"
    return detail["msg"]


def message_with_value(detail: ErrorDetails, field: str) -> str:
    """Return what is wrong with ``field``, as ``--max-rank: must be at least 1 (got 0)``."""
    value = "" if detail["type"] in _NO_VALUE else f" (got {detail['input']!r})"
    return f"{field}: {message(detail)}{value}"


def path(detail: ErrorDetails) -> str:
    """Return where in the JSON the error is, as ``workloads.0.name``; empty for the whole."""
    return ".".join(map(str, detail["loc"]))


def _number(limit: Any) -> str:
    """Return a limit with thousands separators: ``65,536``, ``0.1``."""
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:,.10g}"
