"""Schemas of the messages of a conversation."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import Name, Text, TolerantSchema, escaped, without_unknown
from server.api.schemas.tools import CalledFunction, Calls, ToolCall

MAX_MESSAGES = 4096
MAX_PARTS = 4096
"""Parts of one message's content."""

HARMLESS_IN_MESSAGES = frozenset(
    {
        "annotations",
        "cache_control",
        "id",
        "metadata",
        "parsed",  # the content as an object, in what ``parse`` of OpenAI's client returns
        "provider_specific_fields",
        "reasoning_details",
        "status",
        "thinking_blocks",
        "timestamp",
    }
)
"""Fields of a message that only its client or its original server uses. No chat template reads them."""

UNSUPPORTED_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "refusal": ("",),
    "type": ("message",),
}


def few_parts(content: object, noun: str = "parts") -> None:
    """Raise ValueError if the content of a message has too many parts. Call it before they are validated."""
    if isinstance(content, list) and len(content) > MAX_PARTS:
        raise ValueError(f"must have at most {MAX_PARTS} {noun} (got {len(content)})")


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
    few_parts(value)
    return "".join([_text(part) for part in value]) if isinstance(value, list) else value


def _text(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        named = f"; this model does not read `{escaped(kind[:40])}`" if isinstance(kind, str) else ""
        raise ValueError(f"only content parts of type `text` are supported{named}")
    used = {field: value for field, value in part.items() if TextPart.has_effect(field, value)}
    without_unknown(used, TextPart.model_fields)
    match part.get("text"):
        case str(text):
            return text
    raise ValueError("a content part of type `text` must have a string `text`")


def _or_none(value: object) -> object:
    """Take an empty object as no call."""
    return None if value == {} else value


class Message(TolerantSchema):
    """One message of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_IN_MESSAGES
    harmless: ClassVar[frozenset[str]] = HARMLESS_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text, BeforeValidator(_joined, json_schema_input_type=Text | list[TextPart])] | None = None
    """May be null only in an assistant's message."""
    name: Name | None = None
    tool_calls: Calls | None = None
    """Functions that the assistant has called."""
    function_call: Annotated[CalledFunction | None, BeforeValidator(_or_none)] = None
    """OpenAI's earlier form of one tool call."""
    tool_call_id: Name | None = None
    """In a message of a tool: the call of which it is the result."""
    reasoning_content: Text | None = None
    """The assistant's reasoning, for chat templates that use it. ``reasoning`` is another name for the same field."""
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        """Require ``content``, except in an assistant's message, which clients send back even if it has none."""
        if self.content is None and self.role != "assistant":
            reason = "`content` is missing; only messages of the `assistant` may omit it."
            raise PydanticCustomError("field", reason, {"field": "content"})
        for field in ("tool_calls", "function_call"):
            if getattr(self, field) and self.role != "assistant":
                reason = "Only messages of the `assistant` have calls."
                raise PydanticCustomError("field", reason, {"field": field})
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as :data:`server.text.conversation.Message` has it; a function's is a tool's there."""
        message: dict[str, Any] = {
            "role": "tool" if self.role == "function" else self.role,
            "content": self.content,
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.for_template() for call in self._calls],
        }
        return {field: value for field, value in message.items() if value or field in ("role", "content")}

    @property
    def _calls(self) -> list[ToolCall]:
        called = [] if self.function_call is None else [ToolCall(function=self.function_call)]
        return called + (self.tool_calls or [])


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Return messages for a chat template. Results without a name get that of the function that was called."""
    written = [message.for_template() for message in messages]
    names: dict[str, str] = {}
    for message in written:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ()) if "id" in call}
        if message["role"] == "tool" and message.get("tool_call_id") in names:
            message.setdefault("name", names[message["tool_call_id"]])
    return written
