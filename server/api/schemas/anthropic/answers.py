"""Schemas of the answers of ``POST /v1/messages``, for the OpenAPI document only."""

from typing import Any, Literal

from pydantic import ConfigDict

from server.api.schemas.answers import AppliedAdapter, Explanation
from server.api.schemas.responses import ResponseModel


class TextOutput(ResponseModel):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingOutput(ResponseModel):
    """The reasoning before the blocks that follow. The signature is empty."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseOutput(ResponseModel):
    """A call of a tool, which the client runs."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(ResponseModel):
    """Token counts. Those of the prompt that came from the cache are not in ``input_tokens``."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(ResponseModel):
    """A message of the assistant."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    """Name of the model as in the request."""
    system_fingerprint: str
    """Identifies the base model."""
    adapter: list[AppliedAdapter]
    """Adapters applied; empty for the base alone."""
    content: list[TextOutput | ThinkingOutput | ToolUseOutput]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    explain: Explanation | None = None


class MessageEvent(ResponseModel):
    """One event of a stream; its other fields depend on the type."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class TokenCount(ResponseModel):
    """Number of tokens of a conversation."""

    input_tokens: int


class AnthropicError(ResponseModel):
    """An error in Anthropic's shape, with OpenAI's `param` and `code`."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "timeout_error",
        "api_error",
    ]
    message: str
    param: str | None
    code: str | None


class AnthropicErrorAnswer(ResponseModel):
    """Body of an error response of these endpoints."""

    type: Literal["error"]
    error: AnthropicError
