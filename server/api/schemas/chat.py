"""Schema of ``POST /v1/chat/completions``."""

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import Count
from server.api.schemas.generation import GenerationRequest
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
