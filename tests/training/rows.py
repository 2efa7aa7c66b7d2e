"""Files of rows, and conversations, for the tests of training data."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.data.conversation import Conversation, Turn
from training.data.formats import read_conversations


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(index: int) -> dict[str, str]:
    """One of any number of different rows in Alpaca's format."""
    return {"instruction": f"What is {index} and {index}?", "output": f"It is {2 * index}."}


def conversations(path: Path, format: str = "auto") -> list[Conversation]:
    """All of a file's rows."""
    return [conversation for conversation, _, _ in read_conversations(path, format)]


def chat(*turns: str, untrained: tuple[int, ...] = ()) -> Conversation:
    """A conversation of the user and the assistant in turn; ``untrained`` are places of the assistant's turns."""
    said = []
    for place, content in enumerate(turns):
        role = "assistant" if place % 2 else "user"
        said.append(Turn(role, content, trained=role == "assistant" and place not in untrained))
    return Conversation("rows.jsonl:1", tuple(said))
