"""Files of conversations: JSONL whose rows are the chat format of ``manylora train``."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.cli.chat.conversation import Conversation, Turn
from adapters.cli.chat.speaker import BadInput


@dataclass(frozen=True, slots=True)
class SavedChat:
    """A row of a file."""

    system: str | None
    turns: tuple[Turn, ...]
    adapter: str | None
    """Whose answers they are, if the row says so; training ignores it."""
    pending: str | None
    """A last message without an answer."""


def save(path: Path, conversations: Sequence[Conversation], system: str | None, *, replace: bool) -> int:
    """Write a row for each conversation that has turns; return how many. Raises BadInput."""
    rows = [{"messages": each.messages(system), "adapter": each.speaker.label} for each in conversations if each.turns]
    if not rows:
        raise BadInput("there is nothing to save yet")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part = path.with_name(f".{path.name}.part")
    try:
        if path.exists() and not replace:
            raise BadInput(f"{path} exists, and is not of this chat; choose another name")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    return len(rows)


def load(path: Path) -> list[SavedChat]:
    """Read all rows. Raises BadInput, with the row that is no chat."""
    try:
        with path.open(encoding="utf-8") as file:
            found = [_row(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or os.strerror(error.errno or 0)}") from error
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8") from None
    if not found:
        raise BadInput(f"{path} has no rows")
    return found


def _row(line: str, place: str) -> SavedChat:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{place} is not JSON: {error}") from error
    match row:
        case {"messages": [*messages], **rest} if messages:
            adapter = rest.get("adapter")
            return _chat(messages, adapter if isinstance(adapter, str) else None, place)
    raise BadInput(f'{place} has no messages; a row is {{"messages": [{{"role": "user", "content": ...}}, ...]}}')


def _chat(messages: Sequence[Any], adapter: str | None, place: str) -> SavedChat:
    said = [_text(message, f"{place}: messages.{index}") for index, message in enumerate(messages)]
    system = said.pop(0)[1] if said[0][0] in ("system", "developer") else None
    roles = [role for role, _ in said]
    if roles != [("user", "assistant")[index % 2] for index in range(len(said))]:
        raise BadInput(f"{place}: messages of user and assistant must take turns (got {', '.join(roles)})")
    pairs = list(zip(said[::2], said[1::2], strict=False))
    turns = tuple(Turn(number, prompt, answer) for number, ((_, prompt), (_, answer)) in enumerate(pairs, 1))
    return SavedChat(system, turns, adapter, said[-1][1] if len(said) % 2 else None)


def _text(message: Any, place: str) -> tuple[str, str]:
    match message:
        case {"role": str(role), "content": str(content), **rest}:
            if rest.get("tool_calls"):
                raise BadInput(f"{place}: a chat in the terminal has no tool calls")
            return role, content
    raise BadInput(f"{place} has no role and content that are texts")


def belong_together(chats: Sequence[SavedChat]) -> bool:
    """Return whether rows are what several speakers answered to the same messages, as :func:`save` writes them."""
    asked = [(chat.system, [turn.prompt for turn in chat.turns], chat.pending) for chat in chats]
    return all(chat.adapter is not None for chat in chats) and all(each == asked[0] for each in asked)
