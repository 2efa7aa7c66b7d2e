"""Tools for models whose chat template knows none: described in the system message, calls and results as text.

The convention is that of the Hermes models, which many models have seen in training.
"""

import json
from collections.abc import Sequence
from typing import Any

from server.parsers.tool_formats import ToolFormat
from server.parsers.xml_calls import write_xml
from server.text.conversation import Message

RESULT = ("<tool_response>", "</tool_response>")


def tools_as_text(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], form: ToolFormat, *, system: bool
) -> list[Message]:
    """Return the conversation with tools, calls and results as content.

    ``system``: whether the template writes system messages; if not, the tools are described in the first message of
    the user. Results of consecutive calls become one message of the user.
    """
    written: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"{RESULT[0]}\n{message['content'] or ''}\n{RESULT[1]}"
            if written and written[-1].get("results"):
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result, "results": True})
        elif calls := message.get("tool_calls"):
            content = "\n".join([*filter(None, [message["content"]]), *(_call(call, form) for call in calls)])
            written.append({key: value for key, value in message.items() if key != "tool_calls"} | {"content": content})
        else:
            written.append(message)
    written = [{key: value for key, value in message.items() if key != "results"} for message in written]
    return _with_description(written, _description(tools, form), system) if tools else written


def _with_description(messages: list[Message], description: str, system: bool) -> list[Message]:
    roles = ("system", "developer") if system else ("user",)
    first = 0 if system else next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    if messages[first]["role"] in roles:
        both = [messages[first]["content"] or "", description]
        content = "\n\n".join(filter(None, both if system else reversed(both)))
        return [*messages[:first], messages[first] | {"content": content}, *messages[first + 1 :]]
    return [{"role": roles[0], "content": description}, *messages]


def _description(tools: Sequence[dict[str, Any]], form: ToolFormat) -> str:
    functions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    payload = '{"name": <function name>, "' + form.arguments + '": <object of arguments>}'
    if form.payload == "xml":
        payload = write_xml("<function name>", {"<name of an argument>": "<its value>"})
    example = _written(payload, form)
    return (
        "You may call functions to help with the user's request. These are the functions, one JSON object a line:\n"
        f"<tools>\n{functions}\n</tools>\n"
        f"To call a function, answer with {'text' if form.payload == 'xml' else 'a JSON object'} in this form:\n"
        f"{example}\n"
        f"The result comes in the next message, between {RESULT[0]} and {RESULT[1]}. "
        "Answer in plain text if no function is needed."
    )


def _call(call: dict[str, Any], form: ToolFormat) -> str:
    function = call["function"]
    if form.payload == "xml":
        return _written(write_xml(function["name"], function["arguments"]), form)
    payload = {"name": function["name"], form.arguments: function["arguments"]}
    return _written(json.dumps(payload, ensure_ascii=False), form)


def _written(payload: str, form: ToolFormat) -> str:
    text = f"[{payload}]" if form.payload == "array" else payload
    return f"{form.start}\n{text}\n{form.end}" if form.end else f"{form.start}{text}"
