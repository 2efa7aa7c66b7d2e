"""Schemas of the messages of a conversation."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import Name, Text, TolerantSchema, escaped

MAX_MESSAGES = 4096

HARMLESS_IN_MESSAGES = frozenset(
    {
        "annotations",
        "cache_control",
        "id",
        "metadata",
        "provider_specific_fields",
        "reasoning_details",
        "status",
        "thinking_blocks",
        "timestamp",
    }
)
"""Fields of a message that only its client or its original server uses. No chat template reads them."""

UNSUPPORTED_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": ("",),
    "function_call": ({},),
    "audio": (),
    "refusal": ("",),
    "type": ("message",),
}


def few_messages(value: object) -> object:
    """Check the length before the items are validated."""
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"must have at most {MAX_MESSAGES} messages (got {len(value)})")
    return value


class TextPart(TolerantSchema):
    """A content part of type ``text``."""

    harmless: ClassVar[frozenset[str]] = frozenset({"annotations", "cache_control", "id", "index"})

    type: Literal["text"]
    text: Text


def _joined(value: object) -> object:
    """Join content parts of type ``text`` to one text."""
    return "".join([_text(part) for part in value]) if isinstance(value, list) else value


def _text(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise ValueError("only content parts of type `text` are supported")
    for field, value in part.items():
        if TextPart.has_effect(field, value) and field not in TextPart.model_fields:
            raise ValueError(f"a content part of type `text` has no field `{escaped(field[:80])}`")
    match part.get("text"):
        case str(text):
            return text
    raise ValueError("a content part of type `text` must have a string `text`")


class Message(TolerantSchema):
    """One message of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_IN_MESSAGES
    harmless: ClassVar[frozenset[str]] = HARMLESS_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined, json_schema_input_type=Text | list[TextPart])] | None = None
    """May be null only in an assistant's message."""
    name: Name | None = None
    reasoning_content: Text | None = None
    """The assistant's reasoning, for chat templates that use it. ``reasoning`` is another name for the same field."""
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        """Require ``content``, except in an assistant's message, which clients send back even if it has none."""
        if self.content is None and self.role != "assistant":
            reason = "`content` is missing; only messages of the `assistant` may omit it."
            raise PydanticCustomError("field", reason, {"field": "content"})
        return self

    def for_template(self) -> dict[str, str]:
        """Return the message for a chat template. ``developer`` becomes ``system``, as in OpenAI's own mapping."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        more = {"name": self.name, "reasoning_content": self.reasoning_content or self.reasoning}
        return message | {field: value for field, value in more.items() if value}
