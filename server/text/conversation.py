"""Conversation: what a chat request gives to a chat template, before the template is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""``role``, ``content`` (text or None), and where there are any: ``name``, ``reasoning_content``, ``tool_call_id``, and
``tool_calls``, each with ``id``, ``type`` and ``function`` (``name``, ``arguments`` as an object)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and what the request says about how they are rendered. All values are JSON."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    """Functions that the model may call: ``type`` and ``function`` (``name``, ``description``, ``parameters``)."""
    documents: Sequence[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, from the request's ``chat_template_kwargs``."""
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    """Whether the prompt ends with the beginning of the assistant's next message."""
    continue_final_message: bool = False
    """Whether the prompt ends within the last message, for the model to continue it."""
    special_tokens_in_content: bool = False
    """Whether text of special tokens in messages, tools and documents becomes these tokens. If not, it stays text."""

    @property
    def characters(self) -> int:
        """About how many characters the prompt has."""
        texts = [message.get(field) or "" for message in self.messages for field in ("content", "reasoning_content")]
        calls = [call for message in self.messages for call in message.get("tool_calls", ())]
        return sum(map(len, texts)) + sum(len(str(each)) for each in (*calls, *self.tools, *(self.documents or ())))
