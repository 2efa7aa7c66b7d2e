"""Schemas of generation requests, compatible with OpenAI's clients.

Each of OpenAI's fields is either supported, harmless to ignore, or rejected by name; none is ignored silently. Clients
often send fields they do not use: null means the default in all fields, and empty values of unknown fields are ignored.
"""

from collections.abc import Mapping
from time import monotonic
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import ENCODABLE, MAX_TIMEOUT, TIMEOUT, Name, Schema, TolerantSchema, whole
from server.api.schemas.structured import Choices, GivenOutputs, Pattern, ResponseFormat, SchemaOrText

MAX_STOPS = 16
MAX_STOP_LENGTH = 512
MAX_MIX = 16
MAX_BIAS = 4096
MAX_USER_LENGTH = 1024
MAX_CHOICES = 128
"""Most choices of a request, over all of its prompts."""
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 256
MAX_PRIORITY = 100
INT64 = 2**63

HARMLESS = frozenset(
    {
        "cache_control",
        "guided_decoding_backend",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
"""Fields of OpenAI, OpenRouter and vLLM that have no effect here, whatever their value."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "request_id": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Fields of OpenAI and vLLM that are not supported -> values, besides null, that have no effect and are accepted."""

Whole = BeforeValidator(whole)
Limit = Annotated[int, Field(ge=-1), Whole]
"""Most tokens of an answer. Some clients send -1 for no limit: the answer may fill the context."""
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole]
"""With log probabilities, those of this many most likely tokens."""
TokenId = Annotated[int, Field(ge=0), Whole]
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
    if value == "":
        return []
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and "" in stops:
        raise ValueError("an empty stop string would end every answer before it begins; leave it out")
    return stops


def _few_biases(value: object) -> object:
    """Check the length before the items are validated."""
    if isinstance(value, dict) and len(value) > MAX_BIAS:
        raise ValueError(f"must have at most {MAX_BIAS} tokens (got {len(value)})")
    return value


def field_error(field: str, reason: str) -> PydanticCustomError:
    """Return the error of a field whose value contradicts another one."""
    return PydanticCustomError("field", "{reason}", {"field": field, "reason": reason})


class StreamOptions(TolerantSchema):
    """Options of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's option: include the usage so far in every chunk."""
    progress: bool = False
    """Before the first token, send events with `prompt_progress`: how many tokens of the prompt are computed."""
    include_obfuscation: bool = False


class AdaptedRequest(TolerantSchema):
    """Fields of all requests that run the model: which adapters, and for whom."""

    model: Name | None = None
    adapter: (
        Annotated[
            list[MixEntry],
            Field(max_length=MAX_MIX, fail_fast=True),
            BeforeValidator(_mix, json_schema_input_type=Name | Annotated[list[MixEntry], Field(max_length=MAX_MIX)]),
        ]
        | None
    ) = None
    user: Annotated[str, Field(max_length=MAX_USER_LENGTH), ENCODABLE] | None = None
    """Requests with the same user get the same target of an alias."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), Whole] | None = None
    """vLLM's field: lower is earlier, among the requests of one API key. A point is worth a second of waiting."""
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    """Seconds within which the answer must be complete, as in `x-request-timeout`. Then there is an error."""
    _received: float = PrivateAttr(default_factory=monotonic)
    _header_timeout: float | None = PrivateAttr(default_factory=lambda: TIMEOUT.get())

    @property
    def urgency(self) -> int:
        """Its priority, 0 by default."""
        return self.priority or 0

    @property
    def deadline(self) -> float | None:
        """When the answer must be complete, by ``time.monotonic()``: by the field or by the header, what is sooner."""
        given = [seconds for seconds in (self.timeout, self._header_timeout) if seconds is not None]
        return self._received + min(given) if given else None


class SamplingRequest(AdaptedRequest):
    """Fields of all requests for text, in every API: how it is sampled, and where it ends."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    """0 keeps only the most likely token, like a temperature of 0."""
    top_k: Annotated[int, Field(ge=-1, lt=INT64), Whole] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), Whole] | None = None
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
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    """Tokens that end an answer, besides the model's own end tokens."""
    include_stop_str_in_output: bool | None = None
    """Whether a stop string or stop token that ends an answer is part of its text."""
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    """No end token is sampled, and no stop string looked for, before the answer has this many tokens."""
    explain: bool | None = None
    """Whether to return where the time of the request went."""
    speculation: bool | None = None
    """false: draft no tokens for this request. The answer is the same."""


class GenerationRequest(SamplingRequest):
    """Fields that both of OpenAI's generation endpoints share."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED
    harmless: ClassVar[frozenset[str]] = HARMLESS

    max_tokens: Limit | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    """Number of answers to each prompt. With a seed, each has draws of its own; the first is that of n = 1."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    """Between the parts of JSON come at most one space, or one line break and an indentation of up to 32 characters."""
    structured_outputs: GivenOutputs | None = None
    """vLLM's ways to prescribe the form of the answer."""
    guided_json: SchemaOrText | None = None
    """The names of older versions of vLLM for ``structured_outputs``."""
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    skip_special_tokens: bool | None = None
    """vLLM's field: false keeps the text of special tokens. An end token is not part of the text in any case."""
    prompt_logprobs: Logprobs | None = None
    """vLLM's field: return the log probabilities of the prompt's tokens. Not in a stream."""
    return_token_ids: bool | None = None
    """vLLM's field: return the token ids of prompts and answers."""

    @model_validator(mode="after")
    def _consistent(self) -> "GenerationRequest":
        if self.stream and self.prompt_logprobs is not None:
            raise field_error("prompt_logprobs", "`prompt_logprobs` are not available in a stream.")
        return self

    @property
    def choices(self) -> int:
        """Number of answers that are returned for each prompt."""
        return self.n or 1

    @property
    def samples(self) -> int:
        """Number of answers that are generated for each prompt."""
        return self.choices

    @property
    def needed_prompt_logprobs(self) -> int | None:
        """How many most likely tokens the engine must return with each token of a prompt."""
        return self.prompt_logprobs

    @property
    def token_logprobs(self) -> int | None:
        """How many most likely tokens to return with the log probability of each token; None returns none."""
        return None
