"""Requests as OpenAI's clients send them, checked field by field.

Every field is served, harmless to ignore, or refused by its name; nothing is dropped in silence.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_STOP_LENGTH = 512
MAX_MIX = 16
MAX_MESSAGES = 4096
MAX_BIAS = 4096
MAX_USER_LENGTH = 1024
INT64 = 2**63

HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
"""OpenAI's fields that change no answer here, whatever their value."""

UNSERVED: Mapping[str, tuple[Any, ...]] = {
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
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
"""OpenAI's fields that are not served -> the values, besides null, that ask for nothing."""


UNSERVED_IN_TURNS: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
}


def _encodable(text: str) -> str:
    """JSON can carry half a surrogate pair; UTF-8, which tokenizers read, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[Text, Field(max_length=256)]


class Schema(BaseModel):
    """JSON types as they are, no unknown field, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        """Ends at the first unknown field: pydantic would build an error for each of a million."""
        for field in data if isinstance(data, dict) else ():
            if field not in cls.model_fields:
                # Half a surrogate pair is a field's name in JSON, but pydantic cannot carry it.
                name = str(field).encode(errors="backslashreplace").decode()
                raise PydanticCustomError("unknown", "Unknown field.", {"field": name})
        return data


class MixEntry(Schema):
    """One adapter of a mix, by name."""

    name: Name
    weight: float = Field(1.0, ge=-100, le=100)


def _mix(value: object) -> object:
    """A name alone is a mix of one."""
    return [{"name": value}] if isinstance(value, str) else value


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _few_messages(value: object) -> object:
    """Counted before any is looked at."""
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"must have at most {MAX_MESSAGES} messages (got {len(value)})")
    return value


def _few_biases(value: object) -> object:
    """Counted before any is looked at."""
    if isinstance(value, dict) and len(value) > MAX_BIAS:
        raise ValueError(f"must have at most {MAX_BIAS} tokens (got {len(value)})")
    return value


def _joined(value: object) -> object:
    """Content parts of type text, as one text."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("only content parts of type `text` are served")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a content part of type `text` has a string `text` and nothing else")
        texts.append(part["text"])
    return "".join(texts)


def _without(data: object, unserved: Mapping[str, tuple[Any, ...]], harmless: frozenset[str]) -> object:
    """``data`` less the fields that need not be looked at; refuses what would need to be served."""
    if not isinstance(data, dict):
        return data
    for field, values in unserved.items():
        if data.get(field) is not None and not any(_same(data[field], value) for value in values):
            raise PydanticCustomError("unserved", "`{field}` is not supported.", {"field": field})
    return {field: value for field, value in data.items() if field not in unserved and field not in harmless}


def _same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other


class Message(Schema):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined)]
    name: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: object) -> object:
        """Clients send an assistant's turn back with all its fields."""
        return _without(data, UNSERVED_IN_TURNS, frozenset({"annotations"}))

    def turn(self) -> dict[str, str]:
        """As chat templates want it. They know no developers; OpenAI's own mapping is to ``system``."""
        turn = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return {**turn, "name": self.name} if self.name else turn


class StreamOptions(Schema):
    """What else a stream carries."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Schema):
    """What both endpoints share."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSERVED

    model: Name | None = None
    adapter: Annotated[list[MixEntry], Field(max_length=MAX_MIX, fail_fast=True), BeforeValidator(_mix)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)] | None = (
        None
    )
    stop: (
        Annotated[
            list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            Field(max_length=MAX_STOPS, fail_fast=True),
            BeforeValidator(_stops),
        ]
        | None
    ) = None
    ignore_eos: bool | None = None
    user: Annotated[Text, Field(max_length=MAX_USER_LENGTH)] | None = None
    """Gets the same target of an alias each time."""

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: object) -> object:
        return _without(data, cls.unserved, HARMLESS)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_messages)]
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise PydanticCustomError(
                "unserved", "`max_tokens` and `max_completion_tokens` differ; give one.", {"field": "max_tokens"}
            )
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of answer asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _single(value: object) -> object:
    """A batch of one prompt is that prompt."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError("one prompt a request; several are not supported")
        return value[0]
    return value


def _prompt(value: object) -> object:
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise ValueError("must be a string or a list of token ids")


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **UNSERVED,
        "logprobs": (),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Annotated[str | list[int], BeforeValidator(_prompt), BeforeValidator(_single)]

    @property
    def limit(self) -> int:
        """Tokens of answer asked for; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens
