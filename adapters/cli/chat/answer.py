"""Answer: what has come of an answer so far, and how fast it came."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from adapters.cli.client import JsonObject, RemoteError

ENDINGS = {"length": "cut off at its limit of tokens", "tool_calls": "it calls tools"}
"""``finish_reason`` -> what it means, where that is worth a word."""

SHORTEST = 0.05
"""Seconds from the first text to the last below which there is no speed to speak of: it came in one piece."""


@dataclass(slots=True)
class Answer:
    """One answer while it streams, and afterwards. Times are of ``time.monotonic``."""

    clock: Callable[[], float] = monotonic
    text: str = ""
    reasoning: str = ""
    """What a model that reasons thought before it answered."""
    served_by: str = ""
    """The versions that answered, as ``legal@2``; empty for the base."""
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    progress: tuple[int, int] | None = None
    """Tokens of the prompt that are computed, and all of them, until the first text."""
    stopped: bool = False
    """Whether the user has stopped it."""
    error: RemoteError | None = None
    started: float = field(init=False)
    first: float | None = None
    """When the first text came."""
    last: float | None = None
    """When the latest text came."""

    def __post_init__(self) -> None:
        self.started = self.clock()

    def take(self, chunk: JsonObject) -> None:
        """Add a chunk of a stream, as OpenAI's API sends it."""
        self._read_adapters(chunk.get("adapter"))
        match chunk.get("usage"):
            case {"prompt_tokens": int(prompt), "completion_tokens": int(output), **rest}:
                self.prompt_tokens, self.output_tokens = prompt, output
                match rest.get("prompt_tokens_details"):
                    case {"cached_tokens": int(cached)}:
                        self.cached_tokens = cached
        match chunk.get("prompt_progress"):
            case {"processed": int(processed), "total": int(total)}:
                self.progress = processed, total
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            self._add(delta.get("content") or "", delta.get("reasoning_content") or "")
            self.finish = choice.get("finish_reason") or self.finish

    def _add(self, text: str, reasoning: str) -> None:
        if text or reasoning:
            self.last = self.clock()
            self.first = self.last if self.first is None else self.first
            self.text += text
            self.reasoning += reasoning

    def _read_adapters(self, adapters: Any) -> None:
        if adapters:
            self.served_by = " + ".join(_applied(each, len(adapters) > 1) for each in adapters)

    @property
    def kept(self) -> bool:
        """Whether it becomes part of the conversation: it is complete, or something of it came."""
        return bool(self.text) or (self.error is None and not self.stopped)

    @property
    def to_first_text(self) -> float | None:
        """Seconds until the first text."""
        return None if self.first is None else self.first - self.started

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first text; None if there is too little to say."""
        if self.first is None or self.last is None or self.last - self.first < SHORTEST or self.output_tokens < 2:
            return None
        return (self.output_tokens - 1) / (self.last - self.first)

    def summary(self, base: str) -> str:
        """Return who answered, how fast, and what the prompt cost, as one line."""
        tokens = f"{self.output_tokens:,} token{'' if self.output_tokens == 1 else 's'}"
        parts = [self.served_by or base, tokens + (f", {self.rate:.1f}/s" if self.rate is not None else "")]
        if self.to_first_text is not None:
            parts.append(f"first text {self.to_first_text:.2f} s")
        if self.prompt_tokens:
            parts.append(f"prompt {self.prompt_tokens:,}, {self.cached_tokens:,} cached")
        if self.stopped:
            parts.append("stopped")
        if self.finish in ENDINGS:
            parts.append(ENDINGS[self.finish])
        return " · ".join(parts)


def _applied(entry: JsonObject, weighted: bool) -> str:
    alias, name = entry.get("alias"), str(entry.get("name"))
    said = f"{alias} → {name}" if alias and alias != name else name
    return f"{entry.get('weight', 1):g} {said}" if weighted else said
