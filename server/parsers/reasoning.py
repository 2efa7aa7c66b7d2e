"""ReasoningParser: separates a model's reasoning from its answer, by the markers of its chat template."""

from dataclasses import dataclass

from server.parsers.deltas import ContentDelta, Delta, ReasoningDelta
from server.parsers.tool_calls import partial_marker


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The text before and after the reasoning."""

    start: str
    end: str


MARKERS = (ReasoningMarkers("<think>", "</think>"), ReasoningMarkers("[THINK]", "[/THINK]"))
"""Qwen3, DeepSeek-R1 and many others; Magistral."""


def markers_of(template: str) -> ReasoningMarkers | None:
    """Return the markers that a chat template has in its text; None if it has none that are known."""
    return next((markers for markers in MARKERS if markers.end in template), None)


def opens_reasoning(prompt: str, markers: ReasoningMarkers) -> bool:
    """Whether a rendered prompt ends within the assistant's reasoning, which the answer then continues."""
    return prompt.rfind(markers.start) > prompt.rfind(markers.end) and prompt.rstrip().endswith(markers.start)


class ReasoningParser:
    """Splits text, given in pieces, into reasoning and content. Reasoning comes first, or not at all.

    White space around the reasoning is dropped. Reasoning that does not end is all reasoning.
    """

    def __init__(self, markers: ReasoningMarkers, *, opened: bool) -> None:
        """``opened``: the prompt has ended with the start marker."""
        self._markers = markers
        self._opened = opened
        self._state = "start"
        """``start``, ``reasoning``, ``space`` (behind the reasoning) or ``content``."""
        self._text = ""
        """What was pushed and is not assigned yet."""
        self._length = 0
        """Characters that were pushed."""
        self._begun = False
        """Whether some of the reasoning was returned."""

    def push(self, text: str) -> list[Delta]:
        """Add a piece. Returns the deltas that are certain now."""
        self._text += text
        self._length += len(text)
        deltas: list[Delta] = []
        if self._state == "start":
            self._read_start()
        if self._state == "reasoning":
            deltas += self._read_reasoning()
        if self._state == "space":
            self._text = self._text.lstrip()
            self._state = "content" if self._text else "space"
        if self._state == "content" and self._text:
            deltas.append(ContentDelta(self._text, self._length - len(self._text)))
            self._text = ""
        return deltas

    def finish(self) -> list[Delta]:
        """Return the deltas of the text that was held back."""
        text, self._text = self._text, ""
        reasoning = self._state == "reasoning" or (self._state == "start" and self._opened)
        if reasoning:
            return [ReasoningDelta(text)] if text.strip() else []
        return [ContentDelta(text, self._length - len(text))] if text else []

    def _read_start(self) -> None:
        text, start = self._text.lstrip(), self._markers.start
        if text.startswith(start):  # some models repeat a marker that the prompt has already
            self._text, self._state = text[len(start) :], "reasoning"
        elif not start.startswith(text):
            self._state = "reasoning" if self._opened else "content"

    def _read_reasoning(self) -> list[Delta]:
        if not self._begun:
            self._text = self._text.lstrip()
        found = self._text.find(self._markers.end)
        stop = found if found >= 0 else len(self._text) - partial_marker(self._text, self._markers.end)
        reasoning = self._text[:stop].rstrip()
        if found >= 0:
            self._text, self._state = self._text[found + len(self._markers.end) :], "space"
        else:
            self._text = self._text[len(reasoning) :]
        self._begun = self._begun or bool(reasoning)
        return [ReasoningDelta(reasoning)] if reasoning else []
