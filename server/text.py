"""Text and tokens: chat template, prompts, incremental decoding, stop strings."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidRequest

REPLACEMENT = "\ufffd"
"""U+FFFD, which a decoder writes for bytes that are not valid UTF-8, or not yet."""
MAX_CHARACTER_BYTES = 4
"""Most bytes, and so tokens, of one character in UTF-8."""
MAX_WINDOW = 64
"""Tokens in a window above which invalid bytes at its beginning are dropped."""


class Codec:
    """Encodes prompts and conversations with a base's tokenizer. Any thread may use it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, context: int | None = None) -> None:
        """``vocabulary`` is the number of the model's token ids, which may be more than the tokenizer has.

        With ``context``, text that is too long to fit as many tokens is refused before it is encoded.
        """
        self.vocabulary = vocabulary
        self._context = context
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer's file may turn these on; either would change prompts silently.
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        unknown = range(self.backend.get_vocab_size(), vocabulary)
        self.textless = frozenset(unknown).union(token for token, content in added.items() if content.special)
        """Token ids without text: special tokens, and ids that the tokenizer does not have."""
        self._tokenizer = tokenizer
        self._max_token_characters = max(map(len, self.backend.get_vocab()))
        """Characters."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._tokenizer.chat_template is not None

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation (``role``, ``content``), up to where the assistant's answer begins."""
        if not self.has_chat_template:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
        try:
            text: Any = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise InvalidRequest(f"The chat template rejects these messages: {error}", param="messages") from error
        return self._encode(text, "messages", special=False)

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt. A prompt of token ids is returned as it is, if the model has them all."""
        if isinstance(prompt, str):
            return self._encode(prompt, "prompt", special=True)
        for token in prompt:
            if not 0 <= token < self.vocabulary:
                raise InvalidRequest(f"Token ids are 0 to {self.vocabulary - 1}; {token} is not.", param="prompt")
        return _require_tokens(list(prompt), "prompt")

    def _encode(self, text: str, param: str, *, special: bool) -> list[int]:
        if self._context is not None and len(text) > self._context * self._max_token_characters:
            raise InvalidRequest(
                f"This model's maximum context length is {self._context} tokens. However, your prompt has {len(text)} "
                "characters, which are more tokens than that.",
                param=param,
                code="context_length_exceeded",
            )
        # Unlike encode, encode_batch releases the GIL.
        ids: list[int] = self.backend.encode_batch([text], add_special_tokens=special)[0].ids
        return _require_tokens(ids, param)


def _require_tokens(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    return ids


class Detokenizer:
    """Decodes tokens to text incrementally. All pieces together are the text of all tokens without special tokens.

    The text of a token may depend on the token before it, so each step decodes a window: the tokens of the last piece
    and those after it, as text-generation-inference does. Bytes that may be the beginning of a character are held back.
    """

    def __init__(self, codec: Codec) -> None:
        self._backend = codec.backend
        self._textless = codec.textless
        self._window: list[int] = []
        self._emitted = 0
        """Characters of the window's text that were returned."""
        self._pending = 0
        """Tokens since the last piece that ended with a complete character."""

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is certain now and was not before."""
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


class StopStrings:
    """Ends a text, given in pieces, before the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Add a piece. Returns the text that cannot be part of a stop string; nothing more once ``found`` is set."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        border = len(text) - self._partial_stop(text)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """Return the text that was held back: the beginning of a stop string that was not completed."""
        return self._held

    def _partial_stop(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that is a proper prefix of a stop string."""
        longest = max(min(len(stop) - 1, len(text)) for stop in self._stops)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
