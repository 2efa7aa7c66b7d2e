"""Schema of ``POST /v1/chat/completions``."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from server.api.schemas.generation import HARMLESS, UNSUPPORTED, GenerationRequest, Limit, Logprobs, field_error
from server.api.schemas.messages import Message, few_messages
from server.api.schemas.templates import TemplateFields
from server.api.schemas.tools import AllowedTools, NamedTool, ToolChoice, check_choice
from server.text.conversation import Conversation

SUPPORTED_IN_CHAT = ("tools", "tool_choice", "reasoning_effort")


class ChatRequest(GenerationRequest, TemplateFields):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32},
                {"messages": [{"role": "user", "content": "Hello!"}], "adapter": "legal", "stream": True},
            ]
        }
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{field: values for field, values in UNSUPPORTED.items() if field not in SUPPORTED_IN_CHAT},
        "add_special_tokens": (False,),
        "chat_template": (),
        "include_reasoning": (True,),
        "mm_processor_kwargs": ({},),
        "thinking_token_budget": (),
    }

    harmless: ClassVar[frozenset[str]] = HARMLESS - {"parallel_tool_calls"}

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(few_messages)]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    """Whether to return the log probability of each token of the answer."""
    top_logprobs: Logprobs | None = None
    """With `logprobs`: how many most likely tokens to return for each token."""

    tool_choice: ToolChoice | None = None
    """``none`` leaves the tools out of the prompt. ``required`` and a named function are forced by a grammar."""
    parallel_tool_calls: bool | None = None
    """false: at most one call in an answer."""

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise field_error("max_tokens", "`max_tokens` and `max_completion_tokens` differ; give one.")
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

    @model_validator(mode="after")
    def _has_tool(self) -> "ChatRequest":
        check_choice(self.tools, self.tool_choice)
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

    @property
    def conversation(self) -> Conversation:
        """What the chat template renders."""
        return self.make_conversation(self.messages, self.callable_tools)

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The functions that the model may call, for the chat template."""
        if self.tool_choice == "none":
            return []
        if not isinstance(self.tool_choice, AllowedTools):
            return self.tool_definitions
        allowed = {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        return [tool for tool in self.tool_definitions if tool["function"]["name"] in allowed]

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """The functions of which one must be called; empty if none has to be."""
        match self.tool_choice:
            case NamedTool(function=function):
                return [tool for tool in self.tool_definitions if tool["function"]["name"] == function.name]
            case AllowedTools(allowed_tools=allowed):
                return self.callable_tools if allowed.mode == "required" else []
            case choice:
                return self.tool_definitions if choice == "required" else []

    @property
    def strict_functions(self) -> frozenset[str]:
        """Names of the functions whose arguments always follow their schemas."""
        return frozenset(tool.function.name for tool in self.tools or () if tool.function.strict)
