"""Schema of ``POST /v1/responses``, OpenAI's Responses API, without what a server without memory cannot do."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Required

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
    with_config,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from server.api.schemas.base import Count, Name, Text, TolerantSchema, escaped
from server.api.schemas.generation import Logprobs, SamplingRequest, field_error
from server.api.schemas.responses_api.items import Input
from server.api.schemas.structured import JsonSchema

MAX_TOOLS = 128
REFUSED: Mapping[str, str] = {
    "store": "This server keeps no responses: send `store: false`, or leave it out, which means the same here.",
    "previous_response_id": "This server keeps no responses: send the earlier items in `input`.",
    "conversation": "This server keeps no conversations: send the earlier items in `input`.",
    "background": "This server keeps no responses that could be fetched later: send `background: false`.",
    "prompt": "This server keeps no prompts: send `instructions` and `input`.",
    "truncation": "`truncation` other than `disabled` is not supported: the input is never shortened silently.",
}
"""Fields that only a server with memory could honour -> what to do instead."""
LOGPROBS = "message.output_text.logprobs"
"""The value of ``include`` that asks for the log probabilities of the text's tokens."""
HARMLESS_INCLUDES = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""Values of ``include`` without effect: about tools that are not served, and reasoning, which is never hidden."""


def _function(value: object) -> object:
    """Refuse tools that OpenAI runs itself by their name."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "function":
        raise ValueError(f"tools of type `{escaped(kind)[:80]}` are not supported; only functions are")
    return value


class FunctionTool(TolerantSchema):
    """A function that the model may call."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
    }
    harmless: ClassVar[frozenset[str]] = frozenset({"output_schema"})

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None


class NamedTool(TolerantSchema):
    """Call this function."""

    type: Literal["function"]
    name: Name


class AllowedTools(TolerantSchema):
    """Call only some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


def _choice(value: object) -> object:
    """Check what pydantic's own union would report with one error for each of its members."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("function", "allowed_tools"):
        if value in ("none", "auto", "required"):
            return value
        raise ValueError("must be none, auto, required, or an object with the `type` function or allowed_tools")
    try:
        return (NamedTool if kind == "function" else AllowedTools).model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{first['msg']}, in `{place}`" if place else first["msg"]) from error


@with_config(ConfigDict(strict=True, extra="forbid"))
class TextFormat(TypedDict, total=False):
    """Format of the text. Not a model, for those cannot have a field of the name ``schema``."""

    type: Required[Literal["text", "json_object", "json_schema"]]
    name: Name | None
    schema: JsonSchema | None
    """Only with `json_schema`, which needs one."""
    description: Text | None
    strict: bool | None
    """Has no effect: the schema is always enforced."""


def _has_schema(given: TextFormat) -> TextFormat:
    if (given["type"] == "json_schema") != (given.get("schema") is not None):
        problem = "is missing" if given["type"] == "json_schema" else "needs `type` to be `json_schema`"
        raise PydanticCustomError("field", "`schema` {problem}.", {"problem": problem, "field": "schema"})
    return given


class TextConfig(TolerantSchema):
    """Options of the text."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: Annotated[TextFormat, AfterValidator(_has_schema)] | None = None


class Reasoning(TolerantSchema):
    """Options of the reasoning. A summary is never made: the reasoning itself is in the answer."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"context": (), "mode": ()}
    harmless: ClassVar[frozenset[str]] = frozenset({"summary", "generate_summary"})

    effort: Annotated[str, Field(max_length=32)] | None = None


class ResponseStreamOptions(TolerantSchema):
    """Options of a stream."""

    harmless: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})


def _includable(values: object) -> object:
    for value in values if isinstance(values, list) else ():
        if not isinstance(value, str) or value not in HARMLESS_INCLUDES | {LOGPROBS}:
            known = ", ".join(f"`{each}`" for each in (LOGPROBS, *sorted(HARMLESS_INCLUDES)))
            raise ValueError(f"`{escaped(value)[:80]}` is not supported; only {known} are")
    return values


Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class ResponsesRequest(SamplingRequest):
    """``POST /v1/responses``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": "What is the capital of France?", "max_output_tokens": 32},
                {
                    "instructions": "Answer in one word.",
                    "input": [{"role": "user", "content": "What is the capital of France?"}],
                    "adapter": "legal",
                    "stream": True,
                },
            ]
        }
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": ("",),
        "prompt": (),
        "prompt_cache_options": (),
        "store": (False,),
        "truncation": ("disabled",),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {"prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"}
    )

    input: Input
    """A text, or the items of a conversation."""
    instructions: Text | None = None
    """A message of the developer before the input."""
    max_output_tokens: Count | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: (
        Annotated[
            list[Annotated[FunctionTool, BeforeValidator(_function)]], Field(max_length=MAX_TOOLS, fail_fast=True)
        ]
        | None
    ) = None
    tool_choice: Annotated[ToolChoice, BeforeValidator(_choice, json_schema_input_type=ToolChoice)] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], BeforeValidator(_includable)] | None = None
    """``message.output_text.logprobs`` returns the log probabilities of the text's tokens."""
    top_logprobs: Logprobs | None = None
    """With the log probabilities, those of this many most likely tokens for each token."""
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    """Returned with the response."""

    @model_validator(mode="before")
    @classmethod
    def _without_memory(cls, data: object) -> object:
        """Refuse what needs memory, and say what to do instead."""
        if not isinstance(data, dict):
            return data
        for field, reason in REFUSED.items():
            if data.get(field) not in (None, *cls.unsupported[field]):
                raise PydanticCustomError("unsupported", "{reason}", {"field": field, "reason": reason})
        return data

    @model_validator(mode="after")
    def _has_logprobs(self) -> "ResponsesRequest":
        if self.top_logprobs and not self.includes_logprobs:
            raise field_error("top_logprobs", f"`top_logprobs` needs `include` to have `{LOGPROBS}`.")
        return self

    @property
    def includes_logprobs(self) -> bool:
        """Whether the text comes with the log probabilities of its tokens."""
        return LOGPROBS in (self.include or ())
