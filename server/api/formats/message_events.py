"""MessageEvents: the deltas of one answer as the content blocks and events of Anthropic's Messages API."""

from typing import Any

from pydantic_core import from_json

from server.parsers.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

Json = dict[str, Any]
_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}
"""Type of a block -> type of its deltas, and the field with the text."""


class MessageEvents:
    """Turns deltas into events, and keeps the blocks."""

    def __init__(self) -> None:
        self.blocks: list[Json] = []
        """The complete blocks."""
        self._block: Json | None = None
        """The open block, without its text."""
        self._pieces: list[str] = []

    def add(self, delta: Delta) -> list[Json]:
        """Return the events of a delta."""
        match delta:
            case ContentDelta(text):
                return [*self._enter({"type": "text", "text": ""}), *self._text(text)]
            case ReasoningDelta(text):
                return [*self._enter({"type": "thinking", "thinking": "", "signature": ""}), *self._text(text)]
            case ToolCallDelta(_, None, _, arguments):
                return self._input(arguments)
            case ToolCallDelta(_, call_id, name, arguments):
                block: Json = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return [*self._begin(block), *self._input(arguments)]

    def end(self) -> list[Json]:
        """Return the events that end the open block."""
        if self._block is None:
            return []
        self.blocks.append(self._complete(self._block, "".join(self._pieces)))
        self._block = None
        self._pieces.clear()
        return [{"type": "content_block_stop", "index": len(self.blocks) - 1}]

    def _enter(self, block: Json) -> list[Json]:
        """Begin a block, if the open one is not of its type."""
        return [] if self._block is not None and self._block["type"] == block["type"] else self._begin(block)

    def _begin(self, block: Json) -> list[Json]:
        before = self.end()
        self._block = block
        return [*before, {"type": "content_block_start", "index": len(self.blocks), "content_block": block}]

    def _text(self, text: str) -> list[Json]:
        assert self._block is not None
        kind, field = _DELTAS[self._block["type"]]
        return self._delta({"type": kind, field: text}, text)

    def _input(self, arguments: str) -> list[Json]:
        return self._delta({"type": "input_json_delta", "partial_json": arguments}, arguments)

    def _delta(self, delta: Json, text: str) -> list[Json]:
        self._pieces.append(text)
        return [{"type": "content_block_delta", "index": len(self.blocks), "delta": delta}] if text else []

    @staticmethod
    def _complete(block: Json, text: str) -> Json:
        match block["type"]:
            case "tool_use":
                return {**block, "input": _parse(text)}
            case kind:
                return {**block, _DELTAS[kind][1]: text}


def _parse(arguments: str) -> Json:
    """Return the arguments of a call. Of one that was cut off, those that are complete, as Anthropic's client does."""
    parsed = from_json(arguments or "{}", allow_partial=True)
    assert isinstance(parsed, dict), "a parser only finds calls whose arguments are an object"
    return parsed
