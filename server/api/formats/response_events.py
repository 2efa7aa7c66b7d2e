"""ResponseEvents: the deltas of one answer as the items and typed events of OpenAI's Responses API.

The events of an item come in OpenAI's order: ``output_item.added``, for a text ``content_part.added``, its deltas, its
``done``, for a text ``content_part.done``, ``output_item.done``.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, Literal
from uuid import uuid4

from server.parsers.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

Json = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponseEvents:
    """Turns deltas into events, and keeps the items. Each event has the next ``sequence_number``."""

    def __init__(self, response: Callable[[Status, list[Json]], Json]) -> None:
        """``response`` makes a response object of its status and its items."""
        self.items: list[Json] = []
        """The items so far, of which the last one may be in progress."""
        self._response = response
        self._writer: _TextWriter | _CallWriter | None = None
        """Writes the item in progress."""
        self._number = 0

    def start(self) -> list[Json]:
        """Return the events that begin a stream."""
        return [self._state("created", "in_progress"), self._state("in_progress", "in_progress")]

    def add(self, delta: Delta, logprobs: Seq[Json] = ()) -> list[Json]:
        """Return the events of a delta. ``logprobs`` are those of the tokens of content."""
        match delta:
            case ContentDelta(text):
                opened = self._text("message")
                assert isinstance(self._writer, _TextWriter)
                return self._numbered([*opened, self._writer.add(text, logprobs)])
            case ReasoningDelta(text):
                return self._numbered([*self._text("reasoning"), *self._write(text)])
            case ToolCallDelta(_, call_id, name, arguments):
                opened = [] if call_id is None else self._begin(_CallWriter(len(self.items), call_id, name or ""))
                return self._numbered([*opened, *self._write(arguments)])

    def end(self, status: Status) -> list[Json]:
        """Return the events that end a stream. With any status but ``completed``, the last item is ``incomplete``."""
        closing = self._finish("completed" if status == "completed" else "incomplete")
        return [*self._numbered(closing), self._state(status, status)]

    def _state(self, event: str, status: Status) -> Json:
        """Return an event with the whole response."""
        return self._numbered([{"type": f"response.{event}", "response": self._response(status, list(self.items))}])[0]

    def _text(self, kind: Literal["message", "reasoning"]) -> list[Json]:
        """Begin a text, if the item in progress is not one of this kind."""
        if isinstance(self._writer, _TextWriter) and self._writer.item["type"] == kind:
            return []
        return self._begin(_TextWriter(len(self.items), kind))

    def _begin(self, writer: "_TextWriter | _CallWriter") -> list[Json]:
        """Return the events that end the item in progress and begin another."""
        before = self._finish("completed")
        self._writer = writer
        self.items.append(writer.item)
        return before + writer.begin()

    def _write(self, text: str) -> list[Json]:
        assert self._writer is not None, "the arguments of a call come after its id"
        return [self._writer.add(text)] if text else []

    def _finish(self, status: Status) -> list[Json]:
        """Return the events that end the item in progress."""
        if self._writer is None:
            return []
        events = self._writer.end(status)
        self.items[-1] = self._writer.item
        self._writer = None
        return events

    def _numbered(self, events: list[Json]) -> list[Json]:
        for event in events:
            event["sequence_number"] = self._number
            self._number += 1
        return events


class _TextWriter:
    """Writes an item with one text: a message of the assistant, or reasoning."""

    def __init__(self, index: int, kind: Literal["message", "reasoning"]) -> None:
        self._message = kind == "message"
        id_ = f"{'msg' if self._message else 'rs'}_{uuid4().hex}"
        more: Json = {"role": "assistant"} if self._message else {"summary": []}
        self.item: Json = {"id": id_, "type": kind, "status": "in_progress", **more, "content": []}
        self._item_place = {"output_index": index}
        self._place = {"item_id": id_, "output_index": index, "content_index": 0}
        self._event = "response.output_text" if self._message else "response.reasoning_text"
        self._logprobs: list[Json] = []
        self._pieces: list[str] = []

    def begin(self) -> list[Json]:
        return [
            {"type": "response.output_item.added", **self._item_place, "item": self.item},
            {"type": "response.content_part.added", **self._place, "part": self._part("")},
        ]

    def add(self, text: str, logprobs: Seq[Json] = ()) -> Json:
        self._pieces.append(text)
        self._logprobs += logprobs
        return {"type": f"{self._event}.delta", **self._place, "delta": text, **self._of_message(logprobs)}

    def end(self, status: Status) -> list[Json]:
        text = "".join(self._pieces)
        self.item = {**self.item, "status": status, "content": [self._part(text)]}
        return [
            {"type": f"{self._event}.done", **self._place, "text": text, **self._of_message(self._logprobs)},
            {"type": "response.content_part.done", **self._place, "part": self._part(text)},
            {"type": "response.output_item.done", **self._item_place, "item": self.item},
        ]

    def _part(self, text: str) -> Json:
        if self._message:
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}
        return {"type": "reasoning_text", "text": text}

    def _of_message(self, logprobs: Seq[Json]) -> Json:
        """Return the field that only texts of messages have."""
        return {"logprobs": list(logprobs)} if self._message else {}


class _CallWriter:
    """Writes a call of a function."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        id_ = f"fc_{uuid4().hex}"
        self.item: Json = {
            "id": id_,
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id,
            "name": name,
            "arguments": "",
        }
        self._item_place = {"output_index": index}
        self._place = {"item_id": id_, "output_index": index}
        self._pieces: list[str] = []

    def begin(self) -> list[Json]:
        return [{"type": "response.output_item.added", **self._item_place, "item": self.item}]

    def add(self, text: str) -> Json:
        self._pieces.append(text)
        return {"type": "response.function_call_arguments.delta", **self._place, "delta": text}

    def end(self, status: Status) -> list[Json]:
        arguments = "".join(self._pieces)
        self.item = {**self.item, "status": status, "arguments": arguments}
        done = {"type": "response.function_call_arguments.done", **self._place}
        return [
            {**done, "name": self.item["name"], "arguments": arguments},
            {"type": "response.output_item.done", **self._item_place, "item": self.item},
        ]
