"""Requests as OpenAI's clients send them, checked field by field.

Every field is served, harmless to ignore, or refused by its name; nothing is dropped in silence. Clients fill in what
they do not mean: null is the default everywhere, and an empty value asks for nothing in a field that is not known.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

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
"""Fields of OpenAI and OpenRouter that change no answer here, whatever their value."""

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
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
"""OpenAI's fields that are not served -> the values, besides null, that ask for nothing."""

HARMLESS_IN_TURNS = frozenset(
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
"""Fields of a turn that belong to the client, or to the server that the turn came from. No template reads them."""

UNSERVED_IN_TURNS: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": ("",),
    "function_call": ({},),
    "audio": (),
    "refusal": ("",),
    "type": ("message",),
}


def _encodable(text: str) -> str:
    """JSON can carry half a surrogate pair; UTF-8, which tokenizers read, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode text") from error
    return text


def _whole(value: object) -> object:
    """JSON has one kind of numbers: sliders send 32.0 for 32."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
ENCODABLE = AfterValidator(_encodable)
"""After what bounds the length: pydantic would otherwise speak of a text's items."""
Text = Annotated[str, ENCODABLE]
Name = Annotated[str, Field(max_length=256), ENCODABLE]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), ENCODABLE]


class Schema(BaseModel):
    """JSON types as they are, no unknown field, no NaN or infinity."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        """Ends at the first unknown field: pydantic would build an error for each of a million."""
        for field in data if isinstance(data, dict) else ():
            if field not in cls.model_fields:
                raise PydanticCustomError("unknown", "Unknown field.", {"field": _shown(field)})
        return data


def _shown(field: object) -> str:
    """Half a surrogate pair is a field's name in JSON, but pydantic cannot carry it."""
    return str(field).encode(errors="backslashreplace").decode()


class TolerantSchema(Schema):
    """An object that clients send with more fields than are served: those that ask for nothing are left out."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not served -> the values, besides null, that ask for nothing."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields that change nothing, whatever their value."""

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: object) -> object:
        """``data`` less what asks for nothing; refuses what would need to be served."""
        if not isinstance(data, dict):
            return data
        for field, values in cls.unserved.items():
            if data.get(field) is not None and not any(_same(data[field], value) for value in values):
                raise PydanticCustomError("unserved", "`{field}` is not supported.", {"field": field})
        return {field: value for field, value in data.items() if cls.asks(field, value)}

    @classmethod
    def asks(cls, field: str, value: object) -> bool:
        """Whether a field asks for something, or is one that nobody knows."""
        if field in cls.model_fields:
            return value is not None
        return not (_empty(value) or field in cls.unserved or field in cls.harmless)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Tells of the fields that are accepted without being served, too."""
        schema = handler(core)
        described = handler.resolve_ref_schema(schema)
        properties = described.setdefault("properties", {})
        for field in sorted(cls.harmless):
            properties[field] = {"description": "Accepted, and changes nothing."}
        for field, values in cls.unserved.items():
            properties[field] = {"description": "Not served: asks for nothing or is refused.", "enum": [None, *values]}
        described["additionalProperties"] = {"description": "Asks for nothing.", "enum": [None, "", [], {}]}
        return schema


def _same(value: object, other: object) -> bool:
    """JSON has one kind of numbers, and truth is not among them."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


class MixEntry(Schema):
    """One adapter of a mix, by name."""

    name: Name
    weight: float = Field(1.0, ge=-100, le=100)


def _mix(value: object) -> object:
    """A name alone is a mix of one."""
    return [{"name": value}] if isinstance(value, str) else value


def _stops(value: object) -> object:
    """A string alone is a list of one."""
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and "" in stops:
        raise ValueError("an empty stop string would end every answer before it begins; leave it out")
    return stops


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


class TextPart(TolerantSchema):
    """Text as one of a message's content parts."""

    harmless: ClassVar[frozenset[str]] = frozenset({"annotations", "cache_control", "id", "index"})

    type: Literal["text"]
    text: Text


def _joined(value: object) -> object:
    """Content parts of type text, as one text."""
    return "".join([_text(part) for part in value]) if isinstance(value, list) else value


def _text(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise ValueError("only content parts of type `text` are served")
    for field, value in part.items():
        if TextPart.asks(field, value) and field not in TextPart.model_fields:
            raise ValueError(f"a content part of type `text` has no field `{_shown(field[:80])}`")
    match part.get("text"):
        case str(text):
            return text
    raise ValueError("a content part of type `text` has a string `text`")


class Message(TolerantSchema):
    """One turn of a conversation."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSERVED_IN_TURNS
    harmless: ClassVar[frozenset[str]] = HARMLESS_IN_TURNS

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined, json_schema_input_type=Text | list[TextPart])] | None = None
    """Null only where the assistant said nothing."""
    name: Name | None = None
    reasoning_content: Text | None = None
    """What an assistant thought before it spoke, for templates that know of it; so is the next, by another name."""
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        """Clients send an assistant's turn back as it came, and it may have called tools or nothing at all."""
        if self.content is None and self.role != "assistant":
            reason = "`content` is missing: only an `assistant` may say nothing."
            raise PydanticCustomError("field", reason, {"field": "content"})
        return self

    def turn(self) -> dict[str, str]:
        """As chat templates want it. They know no developers; OpenAI's own mapping is to ``system``."""
        turn = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        more = {"name": self.name, "reasoning_content": self.reasoning_content or self.reasoning}
        return turn | {field: value for field, value in more.items() if value}


class StreamOptions(TolerantSchema):
    """What else a stream carries."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: the usage so far in every chunk, and as the last one."""
    include_obfuscation: bool = False


class GenerationRequest(TolerantSchema):
    """What both endpoints share."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSERVED
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
    """0 is the likeliest token alone, as with a temperature of 0."""
    top_k: Annotated[int, Field(ge=-1, lt=INT64), BeforeValidator(_whole)] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), BeforeValidator(_whole)] | None = None
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
    user: Annotated[str, Field(max_length=MAX_USER_LENGTH), ENCODABLE] | None = None
    """Gets the same target of an alias each time."""


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


Prompt = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""One, as the document describes it; its ids are checked where the vocabulary is known."""


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

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **UNSERVED,
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
        """Tokens of answer asked for; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens
