"""Schema of ``POST /v1/chat/completions``."""

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.generation import GenerationRequest, Limit, Logprobs, field_error
from server.api.schemas.messages import Message, few_messages


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

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(few_messages)]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    """Whether to return the log probability of each token of the answer."""
    top_logprobs: Logprobs | None = None
    """With `logprobs`: how many most likely tokens to return for each token."""

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise PydanticCustomError(
                "unsupported", "`max_tokens` and `max_completion_tokens` differ; give one.", {"field": "max_tokens"}
            )
        return self

    @model_validator(mode="after")
    def _valid(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        if self.limit == 0 and self.prompt_logprobs is None:
            field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise field_error(field, f"`{field}` may be 0 only with `prompt_logprobs`; -1 is no limit.")
        if self.min_tokens and self.limit is not None and self.limit < self.min_tokens:
            raise field_error("min_tokens", f"`min_tokens` must be at most the limit of the answer, {self.limit}.")
        return self

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens in the answer; None for the rest of the context."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if limit == -1 else limit

    @property
    def unlimited(self) -> bool:
        """Whether the request asks for no limit by itself, as some clients do with -1."""
        return -1 in (self.max_tokens, self.max_completion_tokens)

    @property
    def token_logprobs(self) -> int | None:
        """As in :class:`GenerationRequest`."""
        return self.top_logprobs or 0 if self.logprobs else None
