"""Field types for texts: with their token ids, one or several, as embeddings take them; and as parts of a content."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from server.api.schemas.base import TolerantSchema, encodable, escaped

TextOrTokens = str | list[int]
"""A text, or its token ids. The ids are checked later, against the vocabulary."""

One = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""A text or token ids, for the OpenAPI document."""


def text_or_tokens(value: object) -> TextOrTokens:
    """Accept a text or a list of token ids; pydantic's own union would report one error for each of its members."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise ValueError("must be a string or a list of token ids")


def is_several(value: object) -> bool:
    """Whether a value is a list of texts or of lists, and not one text or one list of token ids."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def several(limit: int) -> BeforeValidator:
    """Accept a text, token ids, or a list of at most ``limit`` of either; the field gets a list."""

    def parse(value: object) -> list[TextOrTokens]:
        if not is_several(value):
            return [text_or_tokens(value)]
        assert isinstance(value, list)
        if len(value) > limit:
            raise ValueError(f"must have at most {limit} items (got {len(value)})")
        return [text_or_tokens(each) for each in value]

    return BeforeValidator(
        parse, json_schema_input_type=One | Annotated[list[One], Field(min_length=1, max_length=limit)]
    )


def check_fields(part: object, schema: type[TolerantSchema]) -> None:
    """Raise ValueError if a part has a field that ``schema`` does not know and that is not empty."""
    if not isinstance(part, dict):
        return
    for field, value in part.items():
        if field not in schema.model_fields and schema.has_effect(field, value):
            raise ValueError(f"a part of type `{escaped(part.get('type'))[:80]}` has no field `{escaped(field)[:80]}`")
