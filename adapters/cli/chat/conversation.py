"""Conversation: what was said with one speaker, and what a request for the next answer sends of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters.cli.chat.answer import Answer
from adapters.cli.chat.speaker import Speaker
from adapters.cli.client import JsonObject


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its answer."""

    number: int
    """Counts the messages of a session: the answers of several speakers to one message have the same number."""
    prompt: str
    answer: str


@dataclass(slots=True)
class Conversation:
    """The turns with one speaker."""

    speaker: Speaker
    turns: list[Turn] = field(default_factory=list)

    def messages(self, system: str | None, *prompt: str, before: int | None = None) -> list[JsonObject]:
        """Return the messages of a chat: the system prompt, the turns ``before`` a number, and ``prompt``."""
        said = [turn for turn in self.turns if before is None or turn.number < before]
        messages = [] if system is None else [_message("system", system)]
        for turn in said:
            messages += [_message("user", turn.prompt), _message("assistant", turn.answer)]
        return [*messages, *(_message("user", text) for text in prompt)]

    def keep(self, number: int, prompt: str, answer: Answer) -> None:
        """Add a turn, in the place of one with this number."""
        self.turns = [*(turn for turn in self.turns if turn.number != number), Turn(number, prompt, answer.text)]


def with_speakers(conversations: Sequence[Conversation], speakers: Sequence[Speaker]) -> list[Conversation]:
    """Return a conversation for each speaker. One that is new goes on with what was said with the first."""
    left = list(conversations)
    chosen = []
    for speaker in speakers:
        known = next((each for each in left if each.speaker == speaker), None)
        if known is not None:
            left.remove(known)
        chosen.append(known or Conversation(speaker, list(conversations[0].turns) if conversations else []))
    return chosen


def _message(role: str, content: str) -> JsonObject:
    return {"role": role, "content": content}
