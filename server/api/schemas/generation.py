"""Schemas of generation requests, compatible with OpenAI's clients.

Each of OpenAI's fields is either supported, harmless to ignore, or rejected by name; none is ignored silently. Clients
often send fields they do not use: null means the default in all fields, and empty values of unknown fields are ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import ENCODABLE, Count, Name, Schema, Text, TolerantSchema, encodable, escaped, whole

MAX_STOPS = 16
MAX_STOP_LENGTH = 512
MAX_MIX = 16
MAX_MESSAGES = 4096
MAX_BIAS = 4096
MAX_USER_LENGTH = 1024
INT64 = 2**63

HARMLESS = frozenset(
    {
        "cache_control",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
"""Fields of OpenAI and OpenRouter that have no effect here, whatever their value."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
"""OpenAI's fields that are not supported -> values, besides null, that have no effect and are accepted."""

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

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), ENCODABLE]


class MixEntry(Schema):
    """One adapter of a mix, and its weight."""

    name: Name
    weight: float = Field(1.0, ge=-100, le=100)


def _mix(value: object) -> object:
    """Accept a plain name as a mix of one adapter."""
    return [{"name": value}] if isinstance(value, str) else value


def _stops(value: object) -> object:
    """Accept a plain string as a list of one."""
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and "" in stops:
        raise ValueError("an empty stop string would end every answer before it begins; leave it out")
    return stops


def _few_messages(value: object) -> object:
    """Check the length before the items are validated."""
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"must have at most {MAX_MESSAGES} messages (got {len(value)})")
    return value


def _few_biases(value: object) -> object:
    """Check the length before the items are validated."""
    if isinstance(value, dict) and len(value) > MAX_BIAS:
        raise ValueError(f"must have at most {MAX_BIAS} tokens (got {len(value)})")
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


class StreamOptions(TolerantSchema):
    """Options of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's option: include the usage so far in every chunk."""
    include_obfuscation: bool = False


class GenerationRequest(TolerantSchema):
    """Fields that both generation endpoints share."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED
    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: Name | None = None
    adapter: (
        Annotated[
            list[MixEntry],
            Field(max_length=MAX_MIX, fail_fast=True),
            BeforeValidator(_mix, json_schema_input_type=Name | Annotated[list[MixEntry], Field(max_length=MAX_MIX)]),
        ]
        | None
    ) = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    """0 keeps only the most likely token, like a temperature of 0."""
    top_k: Annotated[int, Field(ge=-1, lt=INT64), BeforeValidator(whole)] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), BeforeValidator(whole)] | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)] | None = (
        None
    )
    stop: (
        Annotated[
            list[Stop],
            Field(max_length=MAX_STOPS, fail_fast=True),
            BeforeValidator(_stops, json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]),
        ]
        | None
    ) = None
    ignore_eos: bool | None = None
    speculation: bool | None = None
    """false: draft no tokens for this request. The answer is the same."""
    user: Annotated[str, Field(max_length=MAX_USER_LENGTH), ENCODABLE] | None = None
    """Requests with the same user get the same target of an alias."""


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32},
                {"messages": [{"role": "user", "content": "Hello!"}], "adapter": "legal", "stream": True},
            ]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_messages)]
    max_completion_tokens: Count | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise PydanticCustomError(
                "unsupported", "`max_tokens` and `max_completion_tokens` differ; give one.", {"field": "max_tokens"}
            )
        return self

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens in the answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _single(value: object) -> object:
    """Accept a list with one prompt."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError("one prompt a request; several are not supported")
        return value[0]
    return value


def _prompt(value: object) -> object:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise ValueError("must be a string or a list of token ids")


Prompt = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""A prompt for the OpenAPI document. Token ids are checked later, against the vocabulary."""


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
                {"prompt": "Once", "adapter": [{"name": "legal", "weight": 0.7}, {"name": "german", "weight": 0.3}]},
            ]
        }
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **UNSUPPORTED,
        "logprobs": (False,),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Annotated[
        str | list[int],
        BeforeValidator(_prompt),
        BeforeValidator(_single, json_schema_input_type=Prompt | Annotated[list[Prompt], Field(max_length=1)]),
    ]

    @property
    def limit(self) -> int:
        """Maximum number of tokens in the answer. OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens
