"""Fields that prescribe the form of an answer: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from server.api.schemas.base import ENCODABLE, Name, Text, TolerantSchema, encodable, without_unknown

MAX_CHOICES = 5000

Pattern = Annotated[str, Field(min_length=1), ENCODABLE]
Choices = Annotated[list[Pattern], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
"""Answers of which the model gives one."""
JsonSchema = Annotated[
    dict[str, Any], Field(description="A JSON schema (draft 2020-12). Keywords that cannot be enforced are refused.")
]


def _schema_or_text(value: object) -> object:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return value
    raise ValueError("must be a JSON schema, or its text")


SchemaOrText = Annotated[
    dict[str, Any] | str, BeforeValidator(_schema_or_text, json_schema_input_type=JsonSchema | str)
]


def known_fields(typed: type) -> BeforeValidator:
    """Refuse the unknown fields of a TypedDict as those of a model are refused, or ignore them with ``--lenient``."""
    return BeforeValidator(lambda data: without_unknown(data, typed.__annotations__))


_TYPED = ConfigDict(strict=True, extra="forbid")
# TypedDicts take the place of models where a field is named `schema` or `json`, which pydantic's models cannot have.


@with_config(_TYPED)
class JsonSchemaFormat(TypedDict, total=False):
    """A schema in OpenAI's wrapping."""

    name: Name | None
    description: Text | None
    schema: JsonSchema | None
    """Without one, the answer is any JSON object."""
    strict: bool | None
    """Has no effect: the schema is always enforced."""


class ResponseFormat(TolerantSchema):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchemaFormat, known_fields(JsonSchemaFormat)] | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            problem = "is missing" if self.json_schema is None else "needs `type` to be `json_schema`"
            raise PydanticCustomError("field", "`json_schema` {problem}.", {"problem": problem, "field": "json_schema"})
        return self


def _given(value: object) -> object:
    """Drop what is not given: clients of vLLM send all fields, most of them null or false."""
    if isinstance(value, dict):
        return {key: field for key, field in value.items() if field is not None and field is not False}
    return value


@with_config(_TYPED)
class StructuredOutputs(TypedDict, total=False):
    """vLLM's ``structured_outputs``: one of these."""

    json: SchemaOrText
    regex: Pattern
    """For the whole answer."""
    choice: Choices
    grammar: Pattern
    """In llguidance's variant of Lark's syntax, or in GBNF."""
    json_object: bool


GivenOutputs = Annotated[StructuredOutputs, known_fields(StructuredOutputs), BeforeValidator(_given)]
