"""What a terminal may be sent of a text that somebody else wrote: no control character, which could steer it."""

import re

_REPLACED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that change the direction of what follows
    "\u2028\u2029\ud800-\udfff]"
)
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def visible(text: str) -> str:
    """Return the text with a picture for each control character, as ``␛`` for ESC; tabs and line feeds stay."""
    return _REPLACED.sub(_picture, text.replace("\r\n", "\n"))


def encodable(text: str) -> str:
    """Return the text with ``?`` for what UTF-8 cannot carry, such as bytes of a terminal that were no UTF-8."""
    return text.encode(errors="replace").decode()


def _picture(found: re.Match[str]) -> str:
    letter = found[0]
    if letter in "\u2028\u2029":
        return "\n"
    if letter == "\x7f":
        return "\N{SYMBOL FOR DELETE}"
    return chr(0x2400 + ord(letter)) if letter < " " else _UNKNOWN
