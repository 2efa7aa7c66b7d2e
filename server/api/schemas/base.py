"""Bases of request schemas, and the field types that several schemas share."""

import json
from collections.abc import Collection, Mapping, Sequence
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


SYNONYMS: Sequence[tuple[str, ...]] = (
    (
        "max_completion_tokens",
        "max_output_tokens",
        "max_tokens",
        "max_new_tokens",
        "max_length",
        "num_predict",
        "n_predict",
    ),
    ("tools", "functions"),
    ("tool_choice", "function_call"),
    ("stop", "stop_sequences", "stop_strings"),
    ("messages", "input", "prompt", "inputs"),
    ("system", "instructions", "system_prompt", "system_instruction"),
    ("response_format", "text", "output_config", "json_schema", "output_format"),
    ("structured_outputs", "guided_json", "grammar", "regex", "choice"),
    ("reasoning_effort", "reasoning", "thinking", "effort"),
    ("repetition_penalty", "repeat_penalty"),
    ("n", "num_return_sequences", "candidate_count"),
    ("seed", "random_seed"),
    ("adapter", "adapters", "lora", "lora_name", "lora_request", "adapter_id", "adapter_name"),
    ("model", "model_name", "model_id", "engine"),
    ("user", "user_id"),
    ("chat_template_kwargs", "template_kwargs"),
)
"""Names that other APIs and servers have for the same field, of which a request has one or several."""

IGNORED: ContextVar[list[str] | None] = ContextVar("IGNORED", default=None)
"""Unknown fields that were ignored in the current request, with ``--lenient``; None if they are refused instead."""


MAX_TIMEOUT = 86_400.0
"""Most seconds that a request can be given."""
TIMEOUT: ContextVar[float | None] = ContextVar("TIMEOUT", default=None)
"""Seconds that the header `x-request-timeout` of the current request gives it."""


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
        nearest = near_field(unknown[0][:MAX_COMPARED], known)
        context = {"field": unknown[0], **({"nearest": nearest} if nearest else {})}
        raise PydanticCustomError("unknown", "Unknown field.", context)
    ignored += unknown
    return {field: value for field, value in data.items() if field in known}


def synonym(field: str, known: Collection[str]) -> str | None:
    """Return the known field that means the same as ``field`` does in another API, None if there is none."""
    return next((name for names in SYNONYMS if field in names for name in names if name in known), None)


def near_field(field: str, known: Collection[str]) -> str | None:
    """Return the known field that an unknown one is meant to be, None if none is like it."""
    return synonym(field, known) or next(iter(get_close_matches(field, known, 1)), None)


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
                context = {"field": field, "instead": _instead(field, values, cls.model_fields)}
                raise PydanticCustomError("unsupported", "`{field}` is not supported{instead}", context)
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


def _instead(field: str, values: Sequence[Any], known: Collection[str]) -> str:
    """Return what to use instead of a field that is not supported: another field, or the values without effect."""
    if (other := synonym(field, known)) is not None:
        return f"; did you mean `{other}`?"
    shown = [f"`{json.dumps(value)}`" for value in values if not _empty(value)]
    return f"; only {' or '.join(shown)} {'are' if shown[1:] else 'is'} accepted." if shown else "."


def _same(value: object, other: object) -> bool:
    """Compare JSON values: 1 equals 1.0 but not true."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
