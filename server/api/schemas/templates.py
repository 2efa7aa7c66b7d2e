"""Schema of the fields that say how messages become a prompt."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import Schema
from server.api.schemas.messages import Message, for_template
from server.api.schemas.tools import JsonObject, Tools
from server.text.conversation import Conversation

MAX_DOCUMENTS = 1024
MAX_VARIABLES = 64
MAX_VARIABLES_LENGTH = 64 << 10
"""Characters of all of a request's variables for the template, as JSON."""


def _few_variables(variables: dict[str, Any]) -> dict[str, Any]:
    if len(variables) > MAX_VARIABLES:
        raise ValueError(f"must have at most {MAX_VARIABLES} variables (got {len(variables)})")
    if (length := len(json.dumps(variables))) > MAX_VARIABLES_LENGTH:
        raise ValueError(f"must have at most {MAX_VARIABLES_LENGTH} characters of JSON (got {length})")
    return variables


class TemplateFields(Schema):
    """Fields that are given to the chat template."""

    tools: Tools | None = None
    """Functions that the model may call."""
    documents: Annotated[list[JsonObject], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = None
    """Documents for chat templates that write them into the prompt."""
    chat_template_kwargs: Annotated[JsonObject, AfterValidator(_few_variables)] | None = None
    """Further variables of the chat template, such as ``enable_thinking``."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """For chat templates that know it. Those that can only turn reasoning on or off take ``none`` as off."""
    add_generation_prompt: bool | None = None
    """Whether the prompt ends with the beginning of the assistant's next message. Null means true, unless
    ``continue_final_message`` is."""
    continue_final_message: bool | None = None
    """Continue the last message instead of beginning a new one."""
    special_tokens_in_content: bool | None = None
    """true: the text of special tokens in messages, tools and documents becomes these tokens, as in a prompt. By
    default it stays text."""

    @model_validator(mode="after")
    def _one_end(self) -> "TemplateFields":
        if self.add_generation_prompt and self.continue_final_message:
            reason = "The prompt ends with the last message or with the beginning of a new one: set one of both."
            raise PydanticCustomError("field", reason, {"field": "continue_final_message"})
        return self

    def make_conversation(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> Conversation:
        """Return what the chat template renders."""
        continued = bool(self.continue_final_message)
        return Conversation(
            for_template(messages),
            tools,
            self.documents,
            self.chat_template_kwargs or {},
            self.reasoning_effort,
            add_generation_prompt=not continued if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=continued,
            special_tokens_in_content=bool(self.special_tokens_in_content),
        )

    @property
    def tool_definitions(self) -> list[dict[str, Any]]:
        """The tools for the chat template."""
        return [tool.for_template() for tool in self.tools or ()]
