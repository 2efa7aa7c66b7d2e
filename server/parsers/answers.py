"""AnswerParser: the text of an assistant's answer to reasoning, content and tool calls."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from server.parsers.deltas import ContentDelta, Delta, MessageParser, PlainText
from server.parsers.reasoning import ReasoningMarkers, ReasoningParser
from server.parsers.tool_calls import ToolCallParser
from server.parsers.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class AnswerSyntax:
    """What an answer may have in it besides content."""

    reasoning: ReasoningMarkers | None = None
    opened: bool = False
    """Whether the prompt ends within the reasoning."""
    tools: ToolFormat | None = None
    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Names of the functions that may be called, with the schemas of their arguments."""
    incremental: bool = False
    """Whether a grammar makes sure that all calls are valid, so that they can be returned as they come."""

    def parser(self) -> MessageParser:
        """Return a parser for one answer."""
        if self.reasoning is None and self.tools is None:
            return PlainText()
        return AnswerParser(
            None if self.reasoning is None else ReasoningParser(self.reasoning, opened=self.opened),
            None if self.tools is None else ToolCallParser(self.tools, self.functions, incremental=self.incremental),
        )

    @property
    def markers(self) -> Collection[str]:
        """Texts that the parser looks for, and that may be special tokens."""
        reasoning = () if self.reasoning is None else (self.reasoning.start, self.reasoning.end)
        return (*reasoning, *(() if self.tools is None else self.tools.markers))


class AnswerParser:
    """Finds reasoning first, then tool calls in what is not reasoning."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._content_start: int | None = None
        """Characters before the content in which calls are looked for; None until it begins."""

    @property
    def has_tool_calls(self) -> bool:
        """Whether a tool call was found."""
        return self._tools is not None and self._tools.count > 0

    def push(self, text: str) -> list[Delta]:
        """Add a piece. Returns the deltas that are certain now."""
        return self._find_calls([ContentDelta(text)] if self._reasoning is None else self._reasoning.push(text))

    def finish(self) -> list[Delta]:
        """Return the deltas of the text that was held back."""
        deltas = self._find_calls([] if self._reasoning is None else self._reasoning.finish())
        return deltas if self._tools is None else deltas + self._placed(self._tools.finish())

    def _find_calls(self, deltas: list[Delta]) -> list[Delta]:
        if self._tools is None:
            return [delta for delta in deltas if not isinstance(delta, ContentDelta) or delta.text]
        found: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self._content_start = delta.start if self._content_start is None else self._content_start
                found += self._placed(self._tools.push(delta.text))
            else:
                found.append(delta)
        return found

    def _placed(self, deltas: list[Delta]) -> list[Delta]:
        """Return deltas of the content, with their places in the whole answer."""
        before = self._content_start
        if not before:
            return deltas
        return [replace(d, start=d.start + before) if isinstance(d, ContentDelta) else d for d in deltas]
