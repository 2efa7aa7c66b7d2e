"""ChatTemplate: renders conversations with one template, and knows what the template can do.

What a template can do is found by rendering small conversations, as its text alone does not tell: whether it writes
tools and calls, whether it wants arguments as an object, content as parts, or a system message at all.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from server.errors import InvalidRequest
from server.parsers.reasoning import ReasoningMarkers, markers_of
from server.parsers.tool_formats import HERMES, ToolFormat, format_of
from server.text.conversation import Conversation, Message
from server.text.template_environment import TemplateFailure
from server.text.tool_prompts import tools_as_text

Render = Callable[[str, Mapping[str, Any]], str]
"""(template, variables) -> text. Raises TemplateFailure."""

RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "return_dict",
        "reasoning_effort",
    }
)
"""Variables that ``chat_template_kwargs`` may not set: the request has fields for them, or they are the server's."""
_CUT = "\ufde0 "
"""Put behind a message that is to be continued: what the template writes after it is cut off. The space tells whether
the template has trimmed the message."""
_NONE_CONTENT = re.compile(r"content(['\"]\])? is (not )?none")
_THINKING = ("enable_thinking", "thinking")
"""Variables that turn reasoning on and off: Qwen3's, and those of DeepSeek V3.1 and Granite."""

_NAME, _KEY, _VALUE, _CALL = "probe_name", "probe_key", "probe_value", "probe0001"
_WRITTEN = re.compile(rf'"{_KEY}":\s*"{_VALUE}"|<parameter={_KEY}>\s*{_VALUE}\s*</parameter>')
"""The argument of a call, as JSON or between Qwen3-Coder's tags."""
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "probe",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}


class TemplateSources(NamedTuple):
    """The text of a chat template."""

    plain: str
    with_tools: str | None = None
    """Used if there are tools; None: the same. Tokenizers of 2024 had two templates."""


def find_sources(value: object) -> TemplateSources | None:
    """Return the texts in a tokenizer's ``chat_template``, which may be text or named texts; None for nothing."""
    if isinstance(value, str):
        return TemplateSources(value)
    if isinstance(value, list):
        value = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
    if isinstance(value, dict) and isinstance(plain := value.get("default"), str):
        with_tools = value.get("tool_use")
        return TemplateSources(plain, with_tools if isinstance(with_tools, str) else None)
    return None


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a template can do."""

    parts: bool
    """It reads content only as a list of parts."""
    system: bool
    """It writes a system message."""
    tools: bool
    """It writes tools, calls of them, and their results."""
    object_arguments: bool
    """It wants the arguments of a call as an object, not as JSON text."""


class ChatTemplate:
    """One chat template. Any thread may use it."""

    def __init__(
        self,
        sources: TemplateSources,
        render: Render,
        special_tokens: Mapping[str, str],
        form: ToolFormat | None = None,
    ) -> None:
        """``special_tokens``: variables such as ``bos_token``. ``form``: how calls are written; None: see its text."""
        self.sources = sources
        self.source = sources.with_tools or sources.plain
        """The template that is used where a request has tools, and mostly elsewhere, too."""
        self.reasoning: ReasoningMarkers | None = markers_of(self.source)
        """The markers around the reasoning in an answer, if the template has any."""
        self._render = render
        self._special_tokens = special_tokens
        self._form = form

    @cached_property
    def traits(self) -> TemplateTraits:
        """What the template can do."""
        user = {"role": "user", "content": _VALUE}
        parts = {"role": "user", "content": [{"type": "text", "text": _VALUE}]}
        only_parts = not self._writes([user], _VALUE) and self._writes([parts], _VALUE)
        return TemplateTraits(
            parts=only_parts,
            system=self._writes([{"role": "system", "content": _NAME}, user], _NAME, parts=only_parts),
            tools=self._writes([user], _NAME, tools=[_TOOL], parts=only_parts)
            and (self._writes_calls({_KEY: _VALUE}, only_parts) or self._writes_calls(_JSON, only_parts)),
            object_arguments=self._writes_calls({_KEY: _VALUE}, only_parts),
        )

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes tool calls; None if the template writes tools in a way that is not known."""
        if self._form is not None:
            return self._form
        return format_of(self.source) if self.traits.tools else HERMES

    def knows(self, variable: str) -> bool:
        """Whether the template uses a variable of this name."""
        return re.search(rf"(?<![\w.'\"]){re.escape(variable)}(?![\w'\"])", self._code) is not None

    @cached_property
    def _code(self) -> str:
        """The template without the text between its tags."""
        return "\n".join(re.findall(r"\{[{%].*?[%}]\}", self.source, re.DOTALL))

    def render(self, conversation: Conversation) -> str:
        """Return the prompt's text. Raises InvalidRequest, with the reason, if the template refuses it."""
        variables = self._variables(conversation)
        messages = list(conversation.messages)
        if conversation.continue_final_message:
            messages[-1] = messages[-1] | {"content": (messages[-1]["content"] or "") + _CUT}
        tools = list(conversation.tools)
        if not self.traits.tools and (tools or any(_has_calls(message) for message in messages)):
            messages, tools = tools_as_text(messages, tools, self._tool_form(), system=self.traits.system), []
        messages = [self._adjusted(message) for message in messages]
        # transformers gives tools and documents as null where there are none.
        given = {"messages": messages, "tools": tools or None, "documents": conversation.documents}
        try:
            source = self.source if conversation.tools else self.sources.plain
            text = self._render(source, {**variables, **given})
        except TemplateFailure as failure:
            raise InvalidRequest(f"The chat template rejects these messages: {failure}", param="messages") from failure
        return _cut(text) if conversation.continue_final_message else text

    def check(self) -> None:
        """Raise TemplateFailure if the template cannot be compiled, or does not render a message of a user."""
        self._try([{"role": "user", "content": _VALUE}], None)

    def prepare(self) -> None:
        """Compile the template and find its traits, which the first request would otherwise wait for."""
        assert self.traits is not None

    def _tool_form(self) -> ToolFormat:
        return self._form or HERMES

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        for name in conversation.variables:
            if name in RESERVED or name in self._special_tokens:
                raise InvalidRequest(f"`chat_template_kwargs` may not set `{name}`.", param="chat_template_kwargs")
        return {
            **conversation.variables,
            **self._effort(conversation),
            **self._special_tokens,
            "add_generation_prompt": conversation.add_generation_prompt,
        }

    def _effort(self, conversation: Conversation) -> dict[str, Any]:
        """Return the variable by which this template takes the request's ``reasoning_effort``."""
        effort = conversation.reasoning_effort
        if effort is None:
            return {}
        if self.knows("reasoning_effort"):
            return {"reasoning_effort": effort}
        for name in _THINKING:
            if self.knows(name) and name not in conversation.variables:
                return {name: effort != "none"}
        if effort == "none":
            return {}
        raise InvalidRequest("This model's chat template has no `reasoning_effort`.", param="reasoning_effort")

    def _adjusted(self, message: Message) -> Message:
        """Return a message as this template wants it."""
        content = message.get("content")
        if content is None and not (_has_calls(message) and _NONE_CONTENT.search(self.source)):
            content = ""
        if self.traits.parts and content is not None:
            content = [{"type": "text", "text": content}]
        adjusted = message | {"content": content}
        if message["role"] == "developer" and "developer" not in self._code:
            adjusted["role"] = "system"
        if not self.traits.object_arguments and "tool_calls" in message:
            adjusted["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        return adjusted

    # Probes

    def _writes_calls(self, arguments: object, parts: bool) -> bool:
        call = {"id": _CALL, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        # Some templates tell calls by content that is null, others cannot add null to text.
        content = None if _NONE_CONTENT.search(self.source) else ""
        messages: list[Message] = [
            {"role": "user", "content": "probe"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": _CALL, "name": _NAME, "content": "probe_result"},
        ]
        text = self._attempt(messages, None, parts)
        return _WRITTEN.search(text) is not None and _NAME in text and "probe_result" in text

    def _writes(
        self, messages: list[Message], wanted: str, tools: list[dict[str, Any]] | None = None, parts: bool = False
    ) -> bool:
        return wanted in self._attempt(messages, tools, parts)

    def _attempt(self, messages: list[Message], tools: list[dict[str, Any]] | None, parts: bool) -> str:
        if parts:
            messages = [each | {"content": [{"type": "text", "text": each["content"] or ""}]} for each in messages]
        try:
            return self._try(messages, tools)
        except TemplateFailure:
            return ""

    def _try(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        variables = {**self._special_tokens, "add_generation_prompt": False}
        return self._render(self.source, {**variables, "messages": messages, "tools": tools, "documents": None})


_JSON = f'{{"{_KEY}": "{_VALUE}"}}'


def _has_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) or message["role"] == "tool"


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _cut(text: str) -> str:
    """Cut off what the template has written behind the message that is to be continued."""
    mark = _CUT.rstrip()
    found = text.rfind(mark)
    if found < 0:
        raise InvalidRequest(
            "The chat template leaves out the last message, so that it cannot be continued.",
            param="continue_final_message",
        )
    kept = text[:found]
    return kept if text.startswith(_CUT, found) else kept.rstrip()
