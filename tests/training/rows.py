"""Files of rows, and conversations, for the tests of training data."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.data.conversation import Conversation, Turn
from training.data.formats import read_conversations


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a JSON Lines file; return ``path``."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(index: int) -> dict[str, str]:
    """Return the row with this number, in Alpaca's format; all differ."""
    return {"instruction": f"What is {index} and {index}?", "output": f"It is {2 * index}."}


def conversations(path: Path, format: str = "auto") -> list[Conversation]:
    """Return all rows of a file as conversations."""
    return [conversation for conversation, _, _ in read_conversations(path, format)]


def chat(*turns: str, untrained: tuple[int, ...] = ()) -> Conversation:
    """Return a conversation of user and assistant in turn; ``untrained``: indices of untrained turns."""
    said = []
    for place, content in enumerate(turns):
        role = "assistant" if place % 2 else "user"
        said.append(Turn(role, content, trained=role == "assistant" and place not in untrained))
    return Conversation("rows.jsonl:1", tuple(said))
