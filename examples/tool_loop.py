"""Lets the model call functions of this program until it has an answer.

    make serve                                   # in another terminal
    .venv/bin/python -m pip install openai       # if `make test` has not done it
    .venv/bin/python examples/tool_loop.py       # or: tool_loop.py "Has order 4712 been sent?"

It shows a tool loop: the request carries the functions' JSON schemas, the answer has calls, this program runs them and
sends the results back, until an answer without calls comes. ``tool_choice: "required"`` makes the first answer a call:
its name is one of the functions and its arguments are valid for its schema, because the server lets the model write
nothing else. Afterwards the model decides for itself ("auto").

It prints each call with its result, and the answer. README.md has what the demo model does well and badly.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from openai import OpenAI

ORDERS = {4711: "a lamp, is on its way", 4712: "a chair, is being packed", 4713: "a desk, was delivered on Monday"}
HOURS = {"Saturday": "open from 10 to 14", "Sunday": "closed"}
MAX_TURNS = 4
QUESTIONS = (
    "Where is my order 4711?",
    "Has order 4713 come?",
    "Are you open on Sunday?",
    "When do you open on Saturday?",
)


def order_status(order: int) -> str:
    """Return what was ordered, and where it is."""
    return f"Order {order}, {ORDERS[order]}." if order in ORDERS else f"There is no order {order}."


def opening_hours(day: str) -> str:
    """Return the opening hours of a day."""
    return f"On {day} the shop is {HOURS.get(day, 'open from 9 to 18')}."


FUNCTIONS: dict[str, Callable[..., str]] = {"order_status": order_status, "opening_hours": opening_hours}
NUMBER = {"type": "integer", "minimum": 1, "maximum": 9999}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def tool(name: str, description: str, properties: dict[str, Any]) -> Any:
    """Return a function's definition as OpenAI has it."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("opening_hours", "Look up when the shop is open on a day.", {"day": {"enum": DAYS}}),
    tool("order_status", "Look up where an order is, by its number.", {"order": NUMBER}),
]
SYSTEM = "You answer customers of a furniture shop. Look things up with the tools, then answer in one short sentence."


def run(client: OpenAI, model: str, question: str) -> str:
    """Return the answer to a question."""
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    choice: Any = "required"
    for _ in range(MAX_TURNS):
        completion = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=100,
        )
        message = completion.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            arguments = json.loads(call.function.arguments)
            result = FUNCTIONS[call.function.name](**arguments)
            print(f"  {call.function.name}({json.dumps(arguments)}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        choice = "auto"
    return f"(no answer after {MAX_TURNS} turns)"


def main() -> None:
    """Ask the question of the command line, or QUESTIONS."""
    client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
    model = client.models.list().data[0].id  # the base
    for question in sys.argv[1:] or QUESTIONS:
        print(question)
        print(f"  {run(client, model, question)}\n")


if __name__ == "__main__":
    main()
