"""Schemas of generation requests, compatible with OpenAI's clients.

Each of OpenAI's fields is either supported, harmless to ignore, or rejected by name; none is ignored silently. Clients
often send fields they do not use: null means the default in all fields, and empty values of unknown fields are ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from server.api.schemas.base import ENCODABLE, Count, Name, Schema, TolerantSchema, whole

MAX_STOPS = 16
MAX_STOP_LENGTH = 512
MAX_MIX = 16
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


def _few_biases(value: object) -> object:
    """Check the length before the items are validated."""
    if isinstance(value, dict) and len(value) > MAX_BIAS:
        raise ValueError(f"must have at most {MAX_BIAS} tokens (got {len(value)})")
    return value


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
