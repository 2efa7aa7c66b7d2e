"""Convert a request of the Responses API to a chat request: from there on, both take the same path."""

from typing import Any

from server.api.schemas.generation import SamplingRequest
from server.api.schemas.responses_api.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
)
from server.api.schemas.responses_api.requests import (
    AllowedTools,
    FunctionTool,
    NamedTool,
    ResponsesRequest,
    TextFormat,
)

Json = dict[str, Any]

FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Field of a chat request -> field of this request that it comes from, for errors."""


def chat_fields(request: ResponsesRequest) -> Json:
    """Return the fields of the chat request that asks for the same."""
    messages = [{"role": "developer", "content": request.instructions}] if request.instructions else []
    fields = {
        **request.model_dump(include=set(SamplingRequest.model_fields)),
        "messages": messages + _messages(request.input),
        "max_tokens": request.max_output_tokens,
        "stream": request.stream,
        "logprobs": request.includes_logprobs or None,
        "top_logprobs": request.top_logprobs if request.includes_logprobs else None,
        "parallel_tool_calls": request.parallel_tool_calls,
        **_tools(request),
        "response_format": request.text and request.text.format and _response_format(request.text.format),
        "reasoning_effort": request.reasoning and request.reasoning.effort,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _messages(items: list[InputItem]) -> list[Json]:
    """Return chat messages. What the assistant did in a row is one message: reasoning, text, and calls."""
    messages: list[Json] = []
    for item in items:
        match item:
            case MessageItem(role="assistant", content=content):
                _join(_turn(messages, "content", "tool_calls"), "content", content)
            case MessageItem(role=role, content=content):
                messages.append({"role": role, "content": content})
            case ReasoningItem(content=parts):
                text = "".join([part.text for part in parts or ()])
                _join(_turn(messages, "content", "tool_calls"), "reasoning_content", text)
            case FunctionCallItem():
                _turn(messages).setdefault("tool_calls", []).append(_call(item))
            case FunctionCallOutputItem(call_id=call_id, output=output):
                messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
    return messages


def _turn(messages: list[Json], *ends: str) -> Json:
    """Return the last message if it is the assistant's and has none of the fields ``ends``, else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or messages[-1].keys() & set(ends):
        messages.append({"role": "assistant"})
    return messages[-1]


def _join(message: Json, field: str, text: str) -> None:
    message[field] = message.get(field, "") + text


def _call(item: FunctionCallItem) -> Json:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


def _tools(request: ResponsesRequest) -> Json:
    """Return ``tools`` and ``tool_choice``."""
    choice: Json | str | None
    match request.tool_choice:
        case NamedTool() as tool:
            choice = _named(tool)
        case AllowedTools(mode=mode, tools=tools):
            allowed = {"mode": mode, "tools": [_named(tool) for tool in tools]}
            choice = {"type": "allowed_tools", "allowed_tools": allowed}
        case choice:
            pass
    return {"tools": _functions(request.tools or []), "tool_choice": choice}


def _named(tool: NamedTool) -> Json:
    return {"type": "function", "function": {"name": tool.name}}


def _functions(tools: list[FunctionTool]) -> list[Json] | None:
    fields = {"name", "description", "parameters", "strict"}
    functions = [tool.model_dump(include=fields, exclude_none=True) for tool in tools]
    return [{"type": "function", "function": function} for function in functions] or None


def _response_format(text: TextFormat) -> Json:
    if text["type"] != "json_schema":
        return {"type": text["type"]}
    return {"type": "json_schema", "json_schema": {name: value for name, value in text.items() if name != "type"}}
