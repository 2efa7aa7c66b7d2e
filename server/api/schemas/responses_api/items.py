"""Schemas of the items of ``POST /v1/responses``: what a conversation is made of in OpenAI's Responses API."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from server.api.schemas.base import Name, Text, TolerantSchema, escaped
from server.api.schemas.inputs import check_fields
from server.api.schemas.messages import few_parts

MAX_ITEMS = 4096


def _text(value: object) -> object:
    """Join content parts to one text."""
    few_parts(value)
    return "".join([_part_text(part) for part in value]) if isinstance(value, list) else value


def _part_text(part: object) -> str:
    match part:
        case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
            check_fields(part, TextPart)
            return text
        case {"type": "refusal", "refusal": str(text)}:
            check_fields(part, RefusalPart)
            return text
        case {"type": "input_text" | "output_text" | "text" | "refusal" as kind}:
            raise ValueError(f"a content part of type `{kind}` must have its text")
    kind = part.get("type") if isinstance(part, dict) else None
    raise ValueError(f"content parts of type `{escaped(kind)[:80]}` are not supported; only text is")


class TextPart(TolerantSchema):
    """A part of a message's content, for the OpenAPI document."""

    harmless: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "text"]
    text: Text


class RefusalPart(TolerantSchema):
    """A refusal by the assistant."""

    type: Literal["refusal"]
    refusal: Text


Content = Annotated[Text, BeforeValidator(_text, json_schema_input_type=Text | list[TextPart | RefusalPart])]


class MessageItem(TolerantSchema):
    """A message of the user, the assistant, or the developer."""

    harmless: ClassVar[frozenset[str]] = frozenset({"id", "status", "phase"})

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(TolerantSchema):
    """A call of a tool by the assistant."""

    harmless: ClassVar[frozenset[str]] = frozenset({"id", "status", "caller", "namespace"})

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text
    """A JSON object."""


class FunctionCallOutputItem(TolerantSchema):
    """The result of a call."""

    harmless: ClassVar[frozenset[str]] = frozenset({"id", "status", "caller", "namespace", "name"})

    type: Literal["function_call_output"]
    call_id: Name
    output: Content


class ReasoningText(TolerantSchema):
    """A part of the reasoning."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(TolerantSchema):
    """The assistant's reasoning before the item that follows."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"encrypted_content": ("",)}
    harmless: ClassVar[frozenset[str]] = frozenset({"id", "status", "summary"})

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None


def _kind(item: object) -> str:
    """Return the type of an item: a message need not name it. Items that are models have been validated before."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else ""


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]
KINDS = ("message", "function_call", "function_call_output", "reasoning")


def served_items(value: object) -> object:
    """Accept a text as one message of the user, and refuse types of items that are not served by their name."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise ValueError(f"must have at most {MAX_ITEMS} items (got {len(value)})")
    return [_typed(item) for item in value] if isinstance(value, list) else value


def _typed(item: object) -> object:
    """Return an item with its type, which a message need not name."""
    kind = (item.get("type") or "message") if isinstance(item, dict) else None
    if not isinstance(item, dict) or kind not in KINDS:
        raise ValueError(f"items of type `{escaped(kind)[:80]}` are not supported; only {', '.join(KINDS)} are")
    return {**item, "type": kind}


Input = Annotated[
    list[InputItem],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(served_items, json_schema_input_type=Text | list[InputItem]),
]
"""A text, or the items of a conversation."""
