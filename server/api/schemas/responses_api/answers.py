"""Schemas of the answers of ``POST /v1/responses``, for the OpenAPI document only."""

from typing import Any, Literal

from pydantic import ConfigDict

from server.api.schemas.answers import AppliedAdapter, Explanation, TokenLogprob
from server.api.schemas.responses import ResponseModel

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(ResponseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]
    """Those of its tokens, on request (`include`)."""


class OutputMessage(ResponseModel):
    """A message of the assistant."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputReasoningText(ResponseModel):
    """The text of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(ResponseModel):
    """The reasoning before the items that follow."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[OutputReasoningText]


class OutputFunctionCall(ResponseModel):
    """A call of a function, which the client runs."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    """A JSON object."""


class IncompleteDetails(ResponseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(ResponseModel):
    """Why a response failed."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class InputTokensDetails(ResponseModel):
    """Details of the input's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseModel):
    """Details of the output's tokens. Those of reasoning are not counted separately."""

    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    """Token counts. A stop token counts as part of the output."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseReasoning(ResponseModel):
    """Options of the reasoning, as in the request."""

    effort: str | None
    summary: None


class ResponseObject(ResponseModel):
    """A response. Its last fields repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    """Unix time in seconds."""
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    """Name of the model as in the request."""
    system_fingerprint: str
    """Identifies the base model."""
    adapter: list[AppliedAdapter]
    """Adapters applied; empty for the base alone."""
    output: list[OutputMessage | OutputReasoning | OutputFunctionCall]
    usage: ResponseUsage | None
    explain: Explanation | None = None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ResponseReasoning
    store: Literal[False]
    """This server keeps no responses."""
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    user: str | None


class ResponseEvent(ResponseModel):
    """One typed event of a stream; its other fields depend on the type. The last one has the whole `response`."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
    response: ResponseObject | None = None
