"""ToolCallParser: finds tool calls in a model's text, by the convention of its family."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from server.parsers.deltas import ContentDelta, Delta, ToolCallDelta
from server.parsers.json_scanner import BrokenJson, JsonScanner, object_in
from server.parsers.tool_formats import ToolFormat
from server.parsers.xml_calls import XmlCall

MAX_NAME = 256
"""Characters of a function's name before its arguments."""
_ARGUMENTS = ("arguments", "parameters")
"""Models mix these up; either is taken."""


class ToolCallParser:
    """Splits text, given in pieces, into content and tool calls. Text that is no call stays content.

    A call is a complete JSON object that names one of the request's functions. It is returned when it is complete, so
    that one that breaks off stays content; where a grammar rules that out, ``incremental`` returns the name and then
    the arguments as they come. White space around calls is dropped.
    """

    def __init__(
        self, form: ToolFormat, functions: Mapping[str, Mapping[str, Any]], *, incremental: bool = False
    ) -> None:
        """``functions``: the names of those that may be called, with the schemas of their arguments."""
        self.count = 0
        """Calls found so far."""
        self._form = form
        self._functions = functions
        self._incremental = incremental
        self._text = ""
        """What was pushed and is not assigned yet."""
        self._length = 0
        """Characters that were pushed."""
        self._deltas: list[Delta] = []
        self._call: _Call | XmlCall | None = None
        """The call that begins at ``_call_begin`` of ``_text``, if one may."""
        self._call_begin = 0
        self._at_start = True
        """Whether there was nothing but white space so far."""
        self._after_call = False
        """Whether what is to come follows a call directly."""
        self._end_seen = False
        self._in_array = False

    def push(self, text: str) -> list[Delta]:
        """Add a piece. Returns the deltas that are certain now."""
        self._text += text
        self._length += len(text)
        while self._text and self._advance():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """Return the deltas of the text that was held back. A grammar's is a call that a limit cut off."""
        call = self._call
        if call is not None and call.returned is not None:
            self._return_arguments(call)
        elif not self._between_calls and not self._incremental:
            self._add_content(self._text)
        self._text, self._call = "", None
        return self._take()

    @property
    def _between_calls(self) -> bool:
        """Whether what is held back follows a call: white space, part of an end marker, or the comma of an array."""
        return self._after_call or (self._in_array and self._call is not None and self._call.ends_array)

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _add_content(self, text: str) -> None:
        """Return ``text``, with which what is not assigned yet begins."""
        if text:
            self._deltas.append(ContentDelta(text, self._length - len(self._text)))
            self._at_start = self._at_start and not text.strip()

    def _advance(self) -> bool:
        """Assign what can be assigned. Returns whether something was, so that more may follow."""
        if self._call is not None:
            return self._read_call(self._call)
        return self._read_after_call() if self._after_call else self._read_content()

    # Content

    def _read_content(self) -> bool:
        """Return content up to where a call may begin."""
        text, start = self._text, self._form.start
        bare = self._form.bare and self._at_start and text.lstrip()[:1] in ("{", "")
        if bare:
            return self._begin_call(0, len(text) - len(text.lstrip())) if text.strip() else False
        found = text.find(start)
        begin = found if found >= 0 else len(text) - partial_marker(text, start)
        begin = len(text[:begin].rstrip())
        self._add_content(text[:begin])
        self._text = text[begin:]
        return found >= 0 and self._begin_call(0, found + len(start) - begin)

    def _begin_call(self, begin: int, payload: int) -> bool:
        """Begin a call. Its text, white space and marker included, begins at ``begin``, its JSON at ``payload``."""
        self._call_begin = begin
        xml = self._form.payload == "xml"
        self._call = XmlCall(payload, self._functions) if xml else _Call(self._form, payload)
        self._in_array = False
        return True

    # Calls

    def _read_call(self, call: "_Call | XmlCall") -> bool:
        try:
            call.read(self._text, self._in_array)
        except BrokenJson:
            return self._give_up(call)
        if call.done:
            return self._end_call(call)
        if self._incremental:
            self._return_arguments(call)
        return False

    def _give_up(self, call: "_Call | XmlCall") -> bool:
        """Return the beginning of what is no call as content, and look for calls in what follows it."""
        if call.returned is not None:
            self._return_arguments(call)
            kept = call.position
        else:
            kept = max(call.payload, 1)
            self._add_content(self._text[:kept])
            self._at_start = False
        self._text, self._call, self._after_call, self._in_array = self._text[kept:], None, False, False
        return True

    def _end_call(self, call: "_Call | XmlCall") -> bool:
        """Return a complete call, or its text if it is none."""
        if call.ends_array:
            self._text, self._in_array = self._text[call.position :], False
        elif call.returned is None and (found := call.complete(self._text, self._functions)) is None:
            return self._give_up(call)
        else:
            if call.returned is None:
                assert found is not None
                self._return_call(*found)
            else:
                self._return_arguments(call)
            self._text = self._text[call.position :]
            if self._form.payload == "array":
                self._call, self._in_array = _Call(self._form, 0), True
                return True
        self._call, self._after_call, self._end_seen = None, True, not self._form.end
        return True

    def _return_call(self, name: str, arguments: str) -> None:
        self._deltas.append(ToolCallDelta(self.count, self._form.new_id(), name, ""))
        self._deltas.append(ToolCallDelta(self.count, None, None, arguments))
        self.count += 1
        self._at_start = False

    def _return_arguments(self, call: "_Call | XmlCall") -> None:
        """Return the name as soon as the arguments begin, and then what has come of them."""
        if call.returned is None:
            name = call.name(self._text)
            span = call.arguments
            if name not in self._functions or span is None or self._text[span[0] : span[0] + 1] != "{":
                return
            self._deltas.append(ToolCallDelta(self.count, self._form.new_id(), name, ""))
            self.count += 1
            self._at_start = False
            call.returned = span[0]
        span = call.arguments
        assert span is not None
        end = call.position if span[1] is None else span[1]
        if end > call.returned:
            self._deltas.append(ToolCallDelta(self.count - 1, None, None, self._text[call.returned : end]))
            call.returned = end

    # After a call

    def _read_after_call(self) -> bool:
        """Drop white space and the end marker; begin another call behind a separator."""
        self._text = self._text.lstrip()
        end, separator = self._form.end, self._form.separator
        if not self._text:
            return False
        if not self._end_seen and self._text.startswith(end):
            self._text, self._end_seen = self._text[len(end) :], True
            return True
        if not self._end_seen and end.startswith(self._text):
            return False
        if separator and self._text.startswith(separator):
            self._after_call = False
            return self._begin_call(0, len(separator))
        self._after_call = False
        return True


class _Call:
    """The text of one call, from its marker, while it comes."""

    def __init__(self, form: ToolFormat, payload: int) -> None:
        self.payload = payload
        """Where the text after the marker begins."""
        self.position = payload
        """Up to where the text was read."""
        self.scanner: JsonScanner | None = None
        """Of the object; None before it begins."""
        self.done = False
        self.returned: int | None = None
        """Up to where the arguments were returned; None if the call was not."""
        self._form = form
        self._begin = 0
        self._name: str | None = None
        self._opened = form.payload != "array"

    def read(self, text: str, in_array: bool) -> None:
        """Read on to the end of ``text``, or of the call. ``in_array``: this is behind an element of an array.

        Raises BrokenJson for what is no call.
        """
        while self.position < len(text) and not self.done:
            if self.scanner is None and not self._read_before(text, in_array):
                return
            if self.scanner is not None:
                self.scanner.feed(text[self.position])
                self.done = self.scanner.done
                self.position += 1

    def _read_before(self, text: str, in_array: bool) -> bool:
        """Read what comes before the object. Returns whether there may be more to read."""
        if self._form.payload == "named" and self._name is None:
            return self._read_name(text)
        character = text[self.position]
        if character == "{" and self._opened:
            self._begin, self.scanner = self.position, JsonScanner()
            return True
        self.position += 1
        if character.isspace():
            return True
        if in_array and not self._opened and character in ",]":
            self._opened, self.done = True, character == "]"
        elif not in_array and not self._opened and character == "[":
            self._opened = True
        else:
            raise BrokenJson("no call begins here")
        return True

    def _read_name(self, text: str) -> bool:
        """Read a name up to where its arguments begin. Returns whether it has come."""
        marker = self._form.before_arguments
        end, brace = text.find(marker, self.payload), text.find("{", self.payload)
        if end < 0 and brace < 0:
            if len(text) - self.payload > MAX_NAME:
                raise BrokenJson("no name")
            return False
        marked = end >= 0 and (brace < 0 or end < brace)
        stop = end if marked else brace
        self._name = text[self.payload : stop].partition("[CALL_ID]")[0].strip()
        self.position = stop + len(marker) if marked else stop
        return self.position < len(text)

    @property
    def ends_array(self) -> bool:
        """Whether no object has begun: what is read is the end of an array, if anything."""
        return self.scanner is None

    @property
    def arguments(self) -> tuple[int, int | None] | None:
        """Where the arguments begin and, if they are complete, end in the text; None if they have not begun."""
        if self.scanner is None:
            return None
        if self._name is not None:
            return self._begin, self.position if self.done else None
        for field in _ARGUMENTS:
            if (span := self.scanner.fields.get(field)) is not None:
                return self._begin + span.begin, None if span.end is None else self._begin + span.end
        return None

    def name(self, text: str) -> str | None:
        """Return the function's name, if it has come."""
        if self._name is not None:
            return self._name
        span = self.scanner.fields.get("name") if self.scanner else None
        if span is None or span.end is None:
            return None
        name = json.loads(text[self._begin + span.begin : self._begin + span.end])
        return name if isinstance(name, str) else None

    def complete(self, text: str, functions: Collection[str]) -> tuple[str, str] | None:
        """Return the name and the arguments, a JSON object, of a complete call; None if it is none."""
        name, span = self.name(text), self.arguments
        if name not in functions or name is None:
            return None
        arguments = object_in(text[span[0] : span[1]]) if span else "{}"
        return None if arguments is None else (name, arguments)


def partial_marker(text: str, marker: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``marker``."""
    lengths = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((length for length in lengths if marker.startswith(text[-length:])), 0)
