"""Convert a request of Anthropic's Messages API to a chat request: from there on, both take the same path."""

import json
from typing import Any

from server.api.schemas.anthropic.requests import (
    AssistantTurn,
    CountTokensRequest,
    MessagesRequest,
    SystemTurn,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from server.api.schemas.generation import SamplingRequest

Json = dict[str, Any]

FIELDS = {
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
}
"""Field of a chat request -> field of this request that it comes from, for errors."""
EFFORTS = {"max": "xhigh"}
"""Efforts that OpenAI has under another name."""
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_fields(request: CountTokensRequest) -> Json:
    """Return the fields of the chat request that asks for the same."""
    output, choice = request.output_config, request.tool_choice
    system = [{"role": "system", "content": request.system}] if request.system else []
    fields = {
        **request.model_dump(include=set(SamplingRequest.model_fields)),
        "messages": [*system, *(message for turn in request.messages for message in _messages(turn))],
        "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in request.tools or ()] or None,
        "tool_choice": None if choice is None else _tool_choice(choice.type, choice.name),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "response_format": output and output.format and _response_format(output.format["schema"]),
        "reasoning_effort": output and output.effort and EFFORTS.get(output.effort, output.effort),
        "chat_template_kwargs": request.thinking and {"enable_thinking": request.thinking.type != "disabled"},
    }
    if request.metadata and request.metadata.user_id:
        fields["user"] = request.metadata.user_id
    if isinstance(request, MessagesRequest):
        fields |= {"max_tokens": request.max_tokens, "stream": request.stream}
        fields["stop"] = request.stop_sequences or fields["stop"]
    return {name: value for name, value in fields.items() if value is not None}


def _messages(turn: UserTurn | AssistantTurn | SystemTurn) -> list[Json]:
    match turn:
        case UserTurn(content=blocks):
            return _user_messages(blocks)
        case AssistantTurn(content=blocks):
            return [_assistant_message(blocks)]
        case SystemTurn(content=content):
            return [{"role": "system", "content": content}]


def _user_messages(blocks: list[TextBlock | ToolResultBlock]) -> list[Json]:
    """Return one message for each result of a tool, and one for the texts between them."""
    messages: list[Json] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": block.content or ""})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += block.text
        else:
            messages.append({"role": "user", "content": block.text})
    return messages or [{"role": "user", "content": ""}]


def _assistant_message(blocks: list[TextBlock | ThinkingBlock | ToolUseBlock]) -> Json:
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    message: Json = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> Json:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool(tool: Json) -> Json:
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(kind: str, name: str | None) -> Json | str:
    return {"type": "function", "function": {"name": name or ""}} if kind == "tool" else TOOL_CHOICES[kind]


def _response_format(schema: Json) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
