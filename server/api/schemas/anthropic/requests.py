"""Schemas of ``POST /v1/messages`` and ``POST /v1/messages/count_tokens``: Anthropic's Messages API."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from server.api.schemas.base import Count, Name, Text, TolerantSchema, escaped
from server.api.schemas.generation import MAX_STOPS, SamplingRequest, Stop
from server.api.schemas.inputs import check_fields
from server.api.schemas.messages import few_parts
from server.api.schemas.structured import JsonSchema

MAX_MESSAGES = 4096
MAX_TOOLS = 128


def refuse_others(kinds: tuple[str, ...], noun: str) -> BeforeValidator:
    """Refuse objects of other types by the name of their type; an object without a type is of the first one."""

    def check(value: object) -> object:
        kind = (value.get("type") or kinds[0]) if isinstance(value, dict) else None
        if isinstance(value, dict) and kind not in kinds:
            raise ValueError(f"{noun} of type `{escaped(kind)[:80]}` are not supported; only {', '.join(kinds)}")
        return {**value, "type": kind} if isinstance(value, dict) else value

    return BeforeValidator(check)


class TextBlock(TolerantSchema):
    """A text."""

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control", "citations"})

    type: Literal["text"]
    text: Text


class ThinkingBlock(TolerantSchema):
    """The assistant's reasoning. The signature is not checked: this server makes empty ones."""

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control", "signature"})

    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(TolerantSchema):
    """A call of a tool by the assistant."""

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control", "caller", "toolset_name"})

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


def _joined(value: object) -> object:
    """Join blocks of type ``text`` to one text."""
    few_parts(value, "blocks")
    return "".join([_text(block) for block in value]) if isinstance(value, list) else value


def _text(block: object) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            check_fields(block, TextBlock)
            return text
        case {"type": "text"}:
            raise ValueError("a block of type `text` must have a string `text`")
    kind = block.get("type") if isinstance(block, dict) else None
    raise ValueError(f"blocks of type `{escaped(kind)[:80]}` are not supported here; only text")


Joined = Annotated[Text, BeforeValidator(_joined, json_schema_input_type=Text | list[TextBlock])]
"""A text, or blocks of type ``text``."""


class ToolResultBlock(TolerantSchema):
    """The result of a call."""

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control", "toolset_name", "is_error"})

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Joined | None = None


def _kind(block: object) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return kind if isinstance(kind, str) else ""


USER_BLOCKS = ("text", "tool_result")
ASSISTANT_BLOCKS = ("text", "thinking", "tool_use")
UserBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(_kind),
    refuse_others(USER_BLOCKS, "blocks"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")],
    Discriminator(_kind),
    refuse_others(ASSISTANT_BLOCKS, "blocks"),
]


def _blocks(value: object) -> object:
    """Accept a text as one block."""
    few_parts(value, "blocks")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class UserTurn(TolerantSchema):
    """A message of the user: texts, and results of tools."""

    role: Literal["user"]
    content: Annotated[
        list[UserBlock],
        Field(fail_fast=True),
        BeforeValidator(_blocks, json_schema_input_type=Text | list[UserBlock]),
    ]


class AssistantTurn(TolerantSchema):
    """A message of the assistant: texts, reasoning, and calls of tools."""

    role: Literal["assistant"]
    content: Annotated[
        list[AssistantBlock],
        Field(fail_fast=True),
        BeforeValidator(_blocks, json_schema_input_type=Text | list[AssistantBlock]),
    ]


class SystemTurn(TolerantSchema):
    """Instructions within the conversation."""

    role: Literal["system"]
    content: Joined


def _role(turn: object) -> str:
    role = turn.get("role") if isinstance(turn, dict) else getattr(turn, "role", None)
    return role if isinstance(role, str) else ""


Turn = Annotated[
    Annotated[UserTurn, Tag("user")]
    | Annotated[AssistantTurn, Tag("assistant")]
    | Annotated[SystemTurn, Tag("system")],
    Discriminator(
        _role,
        custom_error_type="role",
        custom_error_message="must be an object with the `role` user, assistant or system",
    ),
]


def _few(value: object) -> object:
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"must have at most {MAX_MESSAGES} messages (got {len(value)})")
    return value


class Tool(TolerantSchema):
    """A tool that the client runs."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"allowed_callers": (["direct"],), "defer_loading": (False,)}
    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control", "eager_input_streaming", "input_examples"})

    type: Literal["custom"]
    name: Name
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(TolerantSchema):
    """``any``: call some tool; ``tool``: call the one that ``name`` names."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_name(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            reason = "`name` is the tool of a choice of type `tool`, and of no other."
            raise PydanticCustomError("field", reason, {"field": "name"})
        return self


class Thinking(TolerantSchema):
    """Whether the model reasons first, if its chat template has a switch for that.

    ``budget_tokens`` has no effect: Anthropic calls it a target, and the models served here know no such target.
    """

    harmless: ClassVar[frozenset[str]] = frozenset({"budget_tokens", "display"})

    type: Literal["enabled", "disabled", "adaptive"]


@with_config(ConfigDict(strict=True, extra="forbid"))
class JsonFormat(TypedDict):
    """The text is JSON of this schema. Not a model, for those cannot have a field of the name ``schema``."""

    type: Literal["json_schema"]
    schema: JsonSchema


class OutputConfig(TolerantSchema):
    """Options of the answer."""

    effort: Annotated[str, Field(max_length=32)] | None = None
    format: JsonFormat | None = None


class Metadata(TolerantSchema):
    """``user_id``: requests with the same one get the same target of an alias."""

    user_id: Annotated[Name, Field(max_length=256)] | None = None


class CountTokensRequest(SamplingRequest):
    """``POST /v1/messages/count_tokens``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "What is the capital of France?"}]}]}
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "diagnostics", "inference_geo", "service_tier", "user_profile_id", "workspace_id"}
    )

    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True), BeforeValidator(_few)]
    system: Joined | None = None
    tools: (
        Annotated[
            list[Annotated[Tool, refuse_others(("custom",), "tools")]], Field(max_length=MAX_TOOLS, fail_fast=True)
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    metadata: Metadata | None = None


class MessagesRequest(CountTokensRequest):
    """``POST /v1/messages``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"max_tokens": 32, "messages": [{"role": "user", "content": "What is the capital of France?"}]},
                {
                    "max_tokens": 32,
                    "system": "Answer in one word.",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "adapter": "legal",
                    "stream": True,
                },
            ]
        }
    )

    max_tokens: Count
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _one_stop(self) -> "MessagesRequest":
        if self.stop and self.stop_sequences:
            raise PydanticCustomError("field", "Give one of `stop` and `stop_sequences`.", {"field": "stop"})
        return self
