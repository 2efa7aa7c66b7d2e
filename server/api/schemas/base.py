"""Bases of request schemas, and the field types that several schemas share."""

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError


def encodable(text: str) -> str:
    """Reject lone surrogates, which JSON allows but UTF-8, and so the tokenizer, does not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode text") from error
    return text


def whole(value: object) -> object:
    """Convert whole floats to int: JSON has only one number type, and some clients send 32.0 for 32."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_COMPARED = 80
"""Maximum number of characters of an unknown field that are compared with known ones."""
Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]
ENCODABLE = AfterValidator(encodable)
"""Declare after the length limits: pydantic's message would otherwise mention items instead of characters."""
Text = Annotated[str, ENCODABLE]
Name = Annotated[str, Field(max_length=256), ENCODABLE]


IGNORED: ContextVar[list[str] | None] = ContextVar("IGNORED", default=None)
"""Unknown fields that were ignored in the current request, with ``--lenient``; None if they are refused instead."""


class Schema(BaseModel):
    """Base of request schemas: strict types, no unknown fields, no NaN or infinity.

    With ``--lenient``, unknown fields are noted in :data:`IGNORED` and dropped.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    always_strict: ClassVar[bool] = False
    """Whether ``--lenient`` does not apply."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        return without_unknown(data, cls.model_fields, always_strict=cls.always_strict)


def without_unknown(data: object, known: Collection[str], *, always_strict: bool = False) -> object:
    """Return ``data``, if it is an object with known fields only.

    With ``--lenient``, unless ``always_strict``, unknown fields are dropped and noted in :data:`IGNORED`. Otherwise the
    first one is an error: pydantic itself would create an error for every one of them.
    """
    unknown = [escaped(field) for field in data if field not in known] if isinstance(data, dict) else []
    if not isinstance(data, dict) or not unknown:
        return data
    ignored = None if always_strict else IGNORED.get()
    if ignored is None:
        nearest = get_close_matches(unknown[0][:MAX_COMPARED], known, 1)
        context = {"field": unknown[0], **({"nearest": nearest[0]} if nearest else {})}
        raise PydanticCustomError("unknown", "Unknown field.", context)
    ignored += unknown
    return {field: value for field, value in data.items() if field in known}


def escaped(field: object) -> str:
    """Escape lone surrogates, which a JSON key may contain but pydantic cannot handle."""
    return str(field).encode(errors="backslashreplace").decode()


class TolerantSchema(Schema):
    """An object whose unsupported fields are accepted as long as their values have no effect."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Unsupported fields -> values, besides null, that have no effect."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields that have no effect, whatever their value."""

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: object) -> object:
        """Drop fields without effect, and reject unsupported fields."""
        if not isinstance(data, dict):
            return data
        for field, values in cls.unsupported.items():
            if data.get(field) is not None and not any(_same(data[field], value) for value in values):
                raise PydanticCustomError("unsupported", "`{field}` is not supported.", {"field": field})
        return {field: value for field, value in data.items() if cls.has_effect(field, value)}

    @classmethod
    def has_effect(cls, field: str, value: object) -> bool:
        """Whether a field has an effect or is unknown."""
        if field in cls.model_fields:
            return value is not None
        return not (_empty(value) or field in cls.unsupported or field in cls.harmless)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe the fields that are accepted but have no effect, too."""
        schema = handler(core)
        described = handler.resolve_ref_schema(schema)
        properties = described.setdefault("properties", {})
        for field in sorted(cls.harmless - cls.model_fields.keys()):
            properties[field] = {"description": "Accepted; has no effect."}
        for field, values in cls.unsupported.items():
            properties[field] = {
                "description": "Not supported: only these values are accepted, and they have no effect.",
                "enum": [None, *values],
            }
        described["additionalProperties"] = {
            "description": "Unknown fields are accepted only if they are empty.",
            "enum": [None, "", [], {}],
        }
        return schema


def _same(value: object, other: object) -> bool:
    """Compare JSON values: 1 equals 1.0 but not true."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
