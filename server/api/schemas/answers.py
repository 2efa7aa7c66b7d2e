"""Schemas of generated answers, for the OpenAPI document only, as those in :mod:`server.api.schemas.responses`."""

from typing import Literal

from server.api.schemas.responses import ResponseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class AppliedAdapter(ResponseModel):
    """One adapter that was applied to generate the answer."""

    name: str
    """Name with version, as in `legal@2`."""
    id: str
    """SHA-256 of the adapter's content."""
    weight: float
    alias: str | None = None
    """Alias under which the request named the adapter, if it used one."""


class PromptTokens(ResponseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int


class Usage(ResponseModel):
    """Token counts as OpenAI reports them. A stop token counts as part of the completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class Explanation(ResponseModel):
    """Where the time of a request went: that of the choice that ended last. Present on request (`explain`)."""

    queue_ms: float
    """Waiting for its turn."""
    load_ms: float
    """Waiting for its adapters."""
    prefill_ms: float
    """From its first step to its first token."""
    decode_ms: float
    """From its first token to its last."""
    adapter_load: Literal["cold", "warm"] | None
    """Whether an adapter had to be loaded; null for the base."""
    batch_adapters: int
    """Most distinct adapters, the base included, in a step that it took part in."""
    preemptions: int


class Generated(ResponseModel):
    """Fields of every object of a generated answer."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str
    """Name of the model as in the request."""
    system_fingerprint: str
    """Identifies the base model."""
    adapter: list[AppliedAdapter]
    """Adapters applied; empty for the base alone."""
    explain: Explanation | None = None
    """Where the time went, in the last object of an answer that was asked for it."""


class TopLogprob(ResponseModel):
    """One of the most likely tokens at a place of the answer."""

    token: str
    """The token's text. Bytes that are not a complete character are escaped, as in `bytes:\\xf0\\x9f`."""
    logprob: float
    bytes: list[int]
    """The token's bytes in the text; empty for a special token."""


class TokenLogprob(TopLogprob):
    """A token of the answer. The bytes of all tokens together are the bytes of the text."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log probabilities of a message's tokens, without the token or stop string that ended it."""

    content: list[TokenLogprob]
    refusal: None


class PromptLogprob(ResponseModel):
    """The log probability of a token of the prompt, or of one in its place."""

    logprob: float
    rank: int
    """1 for the most likely token."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, token id -> log probability; null for the first token."""


class CalledFunction(ResponseModel):
    """A function that the model calls."""

    name: str
    arguments: str
    """A JSON object."""


class ToolCall(ResponseModel):
    """A call, which the client carries out."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(ResponseModel):
    """The name in the first chunk of a call, then its arguments in pieces."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """What is new in a call."""

    index: int
    id: str | None = None
    """Only in the first chunk of a call, as is `type`."""
    type: Literal["function"] | None = None
    function: FunctionDelta


class AssistantMessage(ResponseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    """The reasoning of a model that reasons before it answers."""
    reasoning: str | None = None
    """The same."""
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ResponseModel):
    """One of `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string or stop token of the request that ended the answer."""
    token_ids: list[int] | None = None
    """Present on request (`return_token_ids`)."""


class ChatCompletion(Generated):
    """A complete chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    """Present on request (`return_token_ids`)."""
    prompt_logprobs: PromptLogprobs | None = None
    """Present on request."""


class Delta(ResponseModel):
    """What is new since the previous chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same."""
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(ResponseModel):
    """What is new in one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    """Only in the last chunk of a choice."""
    token_ids: list[int] | None = None


class PromptProgress(ResponseModel):
    """How many tokens of the prompts are computed, in llama.cpp's words."""

    total: int
    cache: int
    """Those taken from the prefix cache."""
    processed: int
    """Those computed, or taken from the prefix cache."""
    time_ms: int
    """Since the request was submitted."""


class ChunkFields(Generated):
    """Fields of chunks without choices."""

    usage: Usage | None = None
    prompt_progress: PromptProgress | None = None
    """Before the first token, on request (`stream_options.progress`)."""


class ChatCompletionChunk(ChunkFields):
    """One event of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    """Empty in the last chunk if that reports the usage."""
    prompt_token_ids: list[int] | None = None
    """Only in the first chunk, on request."""


class CompletionLogprobs(ResponseModel):
    """Log probabilities of the tokens of a choice, with those of the prompt if it is repeated."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the text before each token."""


class TextChoice(ResponseModel):
    """A choice of a completion or of its chunks."""

    index: int
    """Choices of the first prompt come first."""
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    """The stop string or stop token of the request that ended the answer."""
    prompt_token_ids: list[int] | None = None
    """Present on request (`return_token_ids`); in a stream, in the first chunk of a choice."""
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """Present on request; not in a stream."""


class Completion(Generated):
    """A complete completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class CompletionChunk(ChunkFields):
    """One event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    """Empty in the last chunk if that reports the usage."""
