"""JsonScanner: reads a JSON object character by character, and notices at once when it cannot become one."""

import json
import re
from dataclasses import dataclass, field

MAX_DEPTH = 64
MAX_SCALAR = 512
"""Characters of a number."""
_BLANK = " \t\n\r"
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_HEX = frozenset("0123456789abcdefABCDEF")


class BrokenJson(ValueError):
    """The text is not the beginning of a JSON object."""


@dataclass(slots=True)
class Span:
    """Where the value of a field of the object lies: positions in what was fed."""

    begin: int
    end: int | None = None
    """None while the value is not complete."""


@dataclass(slots=True)
class JsonScanner:
    """Feed it the characters of one object, from its opening brace."""

    fields: dict[str, Span] = field(default_factory=dict)
    """Fields of the object itself -> their values, in the order in which they come."""
    done: bool = False
    """Whether the object is complete. Nothing may be fed after that."""
    length: int = 0
    """Characters fed so far."""
    _stack: list[str] = field(default_factory=list)
    """The brackets that are open."""
    _expect: str = "object"
    """What comes next: ``object``, ``value``, ``value or ]``, ``key``, ``key or }``, ``:``, ``, or end``, and within
    tokens ``string``, ``escape``, ``hex``, ``scalar``."""
    _word: list[str] = field(default_factory=list)
    """Characters of the key or scalar that is being read."""
    _is_key: bool = False
    _hex: int = 0
    _key: str = ""

    def feed(self, character: str) -> None:
        """Add one character. Raises BrokenJson."""
        match self._expect:
            case "string":
                self._in_string(character)
            case "escape":
                self._in_escape(character)
            case "hex":
                self._in_hex(character)
            case "scalar" if character not in ",]}" and character not in _BLANK:
                self._add_to_scalar(character)
            case "scalar":
                self._end_scalar()
                self._between(character)
            case _:
                self._between(character)
        self.length += 1

    def _between(self, character: str) -> None:
        """Take a character outside strings and scalars."""
        if character in _BLANK and self._stack:
            return
        match self._expect:
            case "object" if character == "{":
                self._open("{")
            case "key" | "key or }" if character == '"':
                self._is_key, self._expect = True, "string"
                self._word.clear()
            case "key or }" if character == "}":
                self._close("{")
            case ":" if character == ":":
                self._expect = "value"
            case "value or ]" if character == "]":
                self._close("[")
            case "value" | "value or ]":
                self._begin_value(character)
            case ", or end" if character == ",":
                self._expect = "key" if self._stack[-1] == "{" else "value"
            case ", or end" if character in "]}":
                self._close("{" if character == "}" else "[")
            case _:
                raise BrokenJson(f"{character!r} where {self._expect} is expected")

    def _begin_value(self, character: str) -> None:
        if len(self._stack) == 1:
            if self._key in self.fields:
                raise BrokenJson(f"the field {self._key[:80]!r} occurs twice")
            self.fields[self._key] = Span(self.length)
        if character in "{[":
            self._open(character)
        elif character == '"':
            self._is_key, self._expect = False, "string"
        elif character in "-0123456789tfn":
            self._word[:] = character
            self._expect = "scalar"
        else:
            raise BrokenJson(f"{character!r} where a value is expected")

    def _open(self, bracket: str) -> None:
        if len(self._stack) == MAX_DEPTH:
            raise BrokenJson(f"nested more than {MAX_DEPTH} deep")
        self._stack.append(bracket)
        self._expect = "key or }" if bracket == "{" else "value or ]"

    def _close(self, bracket: str) -> None:
        if self._stack.pop() != bracket:
            raise BrokenJson("brackets do not match")
        if self._stack:
            self._end_value(self.length + 1)
        else:
            self.done = True

    def _end_value(self, end: int) -> None:
        if len(self._stack) == 1:
            self.fields[self._key].end = end
        self._expect = ", or end"

    def _in_string(self, character: str) -> None:
        if character == '"':
            if self._is_key:
                self._end_key()
            else:
                self._end_value(self.length + 1)
            return
        if character < " ":
            raise BrokenJson("a control character in a string")
        if self._is_key:
            self._word.append(character)
        if character == "\\":
            self._expect = "escape"

    def _end_key(self) -> None:
        if len(self._stack) == 1:
            self._key = "".join(self._word)
        self._expect = ":"

    def _in_escape(self, character: str) -> None:
        if character not in '"\\/bfnrtu':
            raise BrokenJson(f"no escape \\{character}")
        if self._is_key:
            self._word.append(character)
        self._expect, self._hex = ("hex", 4) if character == "u" else ("string", 0)

    def _in_hex(self, character: str) -> None:
        if character not in _HEX:
            raise BrokenJson(f"{character!r} in an escape")
        if self._is_key:
            self._word.append(character)
        self._hex -= 1
        if not self._hex:
            self._expect = "string"

    def _add_to_scalar(self, character: str) -> None:
        self._word.append(character)
        if len(self._word) > MAX_SCALAR:
            raise BrokenJson("a number of too many digits")

    def _end_scalar(self) -> None:
        if not _SCALAR.fullmatch("".join(self._word)):
            raise BrokenJson(f"{''.join(self._word)[:40]!r} is no value")
        self._end_value(self.length)


def object_in(text: str) -> str | None:
    """Return the JSON object in the value of ``arguments``: models may write it as a string, or null for none."""
    if text == "null":
        return "{}"
    if not text.startswith('"'):
        return text if text.startswith("{") else None
    inner = json.loads(text).strip()
    try:
        scanner = JsonScanner()
        for character in inner:
            if scanner.done:
                return None
            scanner.feed(character)
    except BrokenJson:
        return None
    return inner if scanner.done else None
