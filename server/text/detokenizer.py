"""Detokenizer: tokens to text, one by one."""

from server.text.codec import Codec

REPLACEMENT = "\ufffd"
"""U+FFFD, which a decoder writes for bytes that are not valid UTF-8, or not yet."""
MAX_CHARACTER_BYTES = 4
"""Most bytes, and so tokens, of one character in UTF-8."""
MAX_WINDOW = 64
"""Tokens in a window above which invalid bytes at its beginning are dropped."""


class Detokenizer:
    """Decodes tokens to text incrementally. All pieces together are the text of all tokens without special tokens.

    The text of a token may depend on the token before it, so each step decodes a window: the tokens of the last piece
    and those after it, as text-generation-inference does. Bytes that may be the beginning of a character are held back.
    """

    def __init__(self, codec: Codec, kept: frozenset[int] = frozenset()) -> None:
        """``kept``: special tokens whose text is returned, too."""
        self._backend = codec.backend
        self._textless = codec.textless
        self._kept = kept
        self._window: list[int] = []
        self._emitted = 0
        """Characters of the window's text that were returned."""
        self._pending = 0
        """Tokens since the last piece that ended with a complete character."""

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is certain now and was not before."""
        if token in self._kept:
            return self._push_special(token)
        if token in self._textless:
            return ""
        self._window.append(token)
        self._pending += 1
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._emit(text)
        if self._pending < MAX_CHARACTER_BYTES:
            return ""
        # Of so many bytes, only the last can still be the beginning of a character.
        piece = text[self._emitted : -1]
        self._emitted = max(self._emitted, len(text) - 1)
        if len(self._window) > MAX_WINDOW:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """Return the text that was held back."""
        return self._decode(self._window)[self._emitted :]

    def _push_special(self, token: int) -> str:
        """Return the text that was held back, and that of a special token. The next token begins a new window."""
        text = self.flush() + (self._backend.id_to_token(token) or "")
        self._window, self._emitted, self._pending = [], 0, 0
        return text

    def _emit(self, text: str) -> str:
        piece = text[self._emitted :]
        if piece:
            self._window = self._window[-self._pending :]
            self._emitted = len(self._decode(self._window))
            self._pending = 0
        return piece

    def _shorten(self, text: str) -> None:
        """Drop as many tokens from the window as possible without changing how the others decode."""
        for cut in range(len(self._window) - MAX_CHARACTER_BYTES, 0, -1):
            tail = self._decode(self._window[cut:])
            if self._decode(self._window[:cut]) + tail == text:
                self._window = self._window[cut:]
                self._emitted = len(tail) - 1
                self._pending = len(self._window)
                return

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text
