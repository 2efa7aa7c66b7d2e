"""What a typed line is: a message, or a command that begins with a slash."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from adapters.cli.chat.speaker import BadInput

_COMMAND = re.compile(r"/([a-z]+|\?)(?:\s+(.*))?\s*", re.DOTALL)
COMMANDS: Mapping[str, tuple[str, str]] = {
    "help": ("", "list these commands"),
    "adapter": ("NAME ...", "who answers: adapters, versions, aliases, or mixes as legal=0.7+german=0.3"),
    "base": ("", "let the base alone answer"),
    "system": ("TEXT", "set the system prompt; - removes it, nothing shows it"),
    "set": ("NAME VALUE", "temperature, top_p, max_tokens, seed, ...; - unsets it, nothing shows all"),
    "plain": ("", "turn Markdown off or on: show answers as they are written"),
    "retry": ("", "answer the last message again"),
    "undo": ("", "remove the last message and its answers"),
    "clear": ("", "begin a new conversation; system prompt and settings stay"),
    "save": ("FILE", "write the conversations as JSONL that `manylora train` reads"),
    "load": ("FILE [ROW]", "go on with a conversation of such a file"),
    "stats": ("", "show requests, tokens and speed of this session"),
    "quit": ("", "end, as Ctrl-D does"),
}
"""Command -> its argument, and what it does."""
OTHER_NAMES: Mapping[str, str] = {"exit": "quit", "adapters": "adapter", "new": "clear", "?": "help"}


@dataclass(frozen=True, slots=True)
class Message:
    """A text for whoever answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and what follows it."""

    name: str
    argument: str


def read_line(text: str) -> Message | Command | None:
    """Parse what was typed; None if it is blank.

    A command is a slash and a word, so that paths and comments of code are messages. With a space in front of it, a
    command is a message, too. Raises BadInput for an unknown command, or one with an argument that it does not take.
    """
    found = _COMMAND.fullmatch(text)
    if found is None:
        return Message(text.strip()) if text.strip() else None
    word, argument = found[1], (found[2] or "").strip()
    name = OTHER_NAMES.get(word, word)
    if name not in COMMANDS:
        near = get_close_matches(word, [*COMMANDS, *OTHER_NAMES], n=1, cutoff=0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists what there is"
        raise BadInput(f"there is no command /{word}; {hint} (with a space in front of it, it is a message)")
    if argument and not COMMANDS[name][0]:
        raise BadInput(f"/{name} takes nothing after it")
    return Command(name, argument)
