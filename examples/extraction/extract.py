"""Extracts orders as JSON: the base against an adapter trained for it, both with and without a schema.

    make serve                                          # in another terminal
    .venv/bin/python -m pip install openai              # if `make test` has not done it
    .venv/bin/python examples/extraction/extract.py

It shows what a schema gives and what training gives. With ``response_format`` every answer is valid JSON with the right
keys and types, from the base, too; whether the values are right is another question, and that is what the adapter is
for. If the server has no adapter named ``orders``, the program first trains one on train.jsonl with `manylora train`,
which publishes it: minutes on two cores.

It prints a table of the scores on the rows of held-out.jsonl, and one order with all four answers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

FOLDER = Path(__file__).parent
URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
ADAPTER = "orders"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "maxLength": 40},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
        "city": {"type": "string", "maxLength": 40},
        "express": {"type": "boolean"},
    },
    "required": ["item", "quantity", "city", "express"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}


def train() -> None:
    """Train the adapter and publish it to the server."""
    words = [str(FOLDER / "train.jsonl"), "--eval-file", str(FOLDER / "held-out.jsonl"), "--name", ADAPTER]
    words += ["--epochs", "2", "--min-json-validity", "0.9", "--publish", URL.removesuffix("/v1")]
    print("$ manylora train", *words, flush=True)
    subprocess.run([sys.executable, str(FOLDER.parents[1] / "manylora.py"), "train", *words], check=True)


def extract(client: OpenAI, model: str, messages: list[Any], with_schema: bool) -> str:
    """Return the model's answer to an order."""
    options: dict[str, Any] = {"response_format": FORMAT} if with_schema else {}
    completion = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=100, **options
    )
    return completion.choices[0].message.content or ""


def parsed(text: str) -> dict[str, Any] | None:
    """Return an answer as an order; None if it is not JSON with the right keys."""
    try:
        order = json.loads(text)
    except ValueError:
        return None
    return order if isinstance(order, dict) and order.keys() == SCHEMA["properties"].keys() else None


def score(answers: list[str], wanted: list[dict[str, Any]]) -> dict[str, str]:
    """Return how many answers are orders, and how many fields and whole orders are right."""
    orders = [parsed(answer) for answer in answers]
    pairs = list(zip(orders, wanted, strict=True))
    fields = [order is not None and order[key] == right[key] for order, right in pairs for key in right]
    return {
        "valid": f"{sum(order is not None for order in orders)}/{len(orders)}",
        "fields right": f"{sum(fields)}/{len(fields)}",
        "orders right": f"{sum(order == right for order, right in pairs)}/{len(orders)}",
    }


def main() -> None:
    """Train the adapter if need be, and compare."""
    client = OpenAI(base_url=URL, api_key="none")
    names = [model.id for model in client.models.list()]
    if ADAPTER not in names:
        train()
    rows = [json.loads(line)["messages"] for line in (FOLDER / "held-out.jsonl").read_text().splitlines()]
    wanted = [json.loads(row[-1]["content"]) for row in rows]
    print(f"\n{'':22}{'valid':>8}{'fields right':>14}{'orders right':>14}")
    shown = [f"order    {rows[0][1]['content']}"]
    for model, label in ((names[0], "base"), (ADAPTER, "adapter")):
        for with_schema in (False, True):
            answers = [extract(client, model, row[:-1], with_schema) for row in rows]
            name = f"{label}, {'schema' if with_schema else 'free'}"
            scores = score(answers, wanted)
            print(f"{name:22}{scores['valid']:>8}{scores['fields right']:>14}{scores['orders right']:>14}")
            shown.append(f"{name:18} {' '.join(answers[0].split())[:120]}")
    print("", *shown, sep="\n")


if __name__ == "__main__":
    main()
