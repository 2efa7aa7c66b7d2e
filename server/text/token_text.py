"""TokenTexts: text and bytes of single tokens, as log probabilities show them."""

import re

from tokenizers import Tokenizer, pre_tokenizers

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token of a tokenizer with byte fallback that is one byte."""


def _byte_level() -> dict[str, int]:
    """Character of byte-level BPE -> byte: printable Latin-1 stands for itself, all else for code points above 255."""
    printable = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert symbols.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return symbols


BYTE_LEVEL = _byte_level()


class TokenTexts:
    """Text and bytes of the tokens of one tokenizer. For one thread."""

    def __init__(self, backend: Tokenizer, textless: frozenset[int]) -> None:
        """``textless``: token ids that have no text in an answer."""
        self._backend = backend
        self._textless = textless
        self._known: dict[int, tuple[str, bytes]] = {}
        # Some decoders drop the space before the first token: here each token is decoded after this one.
        ids = backend.encode("a", add_special_tokens=False).ids
        self._anchor: list[int] = ids[-1:]
        self._anchor_text: str = backend.decode(self._anchor)

    def text(self, token: int) -> str:
        """Return the token's text. Bytes that are no complete characters are escaped, as OpenAI's legacy API does."""
        return self._find(token)[0]

    def data(self, token: int) -> bytes:
        """Return the token's bytes in the text of an answer: none for a special token."""
        return self._find(token)[1]

    def _find(self, token: int) -> tuple[str, bytes]:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._make(token)
        return found

    def _make(self, token: int) -> tuple[str, bytes]:
        name: str = self._backend.id_to_token(token) or ""
        if token in self._textless:
            return name, b""
        data = self._bytes(token, name)
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join([f"\\x{byte:02x}" for byte in data]), data

    def _bytes(self, token: int, name: str) -> bytes:
        text: str = self._backend.decode([*self._anchor, token])
        if text.startswith(self._anchor_text) and _REPLACEMENT not in text:
            return text[len(self._anchor_text) :].encode()
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if all(symbol in BYTE_LEVEL for symbol in name):
            return bytes([BYTE_LEVEL[symbol] for symbol in name])
        return name.encode()
