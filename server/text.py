"""Text and tokens: chat template, prompts, incremental decoding, stop strings."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidRequest

BROKEN = "\ufffd"
"""What a decoder gives for bytes that are not, or not yet, a character."""
LONGEST_CHARACTER = 4
"""Bytes, so tokens at most, of one character in UTF-8."""
WINDOW = 64
"""Tokens a window may have before broken bytes at its beginning are let go."""


class Codec:
    """A base's tokenizer. Any thread may use it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, context: int | None = None) -> None:
        """``vocabulary`` is the number of token ids the model knows, which may be more than the tokenizer has.

        Text that cannot fit ``context`` tokens is refused before it is encoded.
        """
        self.vocabulary = vocabulary
        self._context = context
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer's file may ask for both; either would change prompts without a word.
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        unknown = range(self.backend.get_vocab_size(), vocabulary)
        self.silent = frozenset(unknown).union(token for token, content in added.items() if content.special)
        """Token ids without text."""
        self._tokenizer = tokenizer
        self._longest_token = max(map(len, self.backend.get_vocab()))
        """Characters."""

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._tokenizer.chat_template is not None

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation (``role``, ``content``), up to where the assistant begins to speak."""
        if not self.chats:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
        try:
            text: Any = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        return self._encode(text, "messages", special=False)

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a plain prompt; ids are taken as they are if the model knows them."""
        if isinstance(prompt, str):
            return self._encode(prompt, "prompt", special=True)
        for token in prompt:
            if not 0 <= token < self.vocabulary:
                raise InvalidRequest(f"Token ids are 0 to {self.vocabulary - 1}; {token} is not.", param="prompt")
        return _not_empty(list(prompt), "prompt")

    def _encode(self, text: str, param: str, *, special: bool) -> list[int]:
        if self._context is not None and len(text) > self._context * self._longest_token:
            raise InvalidRequest(
                f"This model's maximum context length is {self._context} tokens. However, your prompt has {len(text)} "
                "characters, which are more tokens than that.",
                param=param,
                code="context_length_exceeded",
            )
        # Unlike encode, encode_batch lets other threads run meanwhile.
        ids: list[int] = self.backend.encode_batch([text], add_special_tokens=special)[0].ids
        return _not_empty(ids, param)


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    return ids


class Detokenizer:
    """Tokens to text, piece by piece. Together the pieces are the text of all tokens, special tokens left out.

    What a token reads as may depend on the one before it, so each step decodes a window: the tokens of the last piece
    and those after it (the way of text-generation-inference). Bytes that may still become a character are held back.
    """

    def __init__(self, codec: Codec) -> None:
        self._backend = codec.backend
        self._silent = codec.silent
        self._window: list[int] = []
        self._given = 0
        """Characters of the window's text that were given out."""
        self._fresh = 0
        """Tokens since the last piece that ended with a whole character."""

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if token in self._silent:
            return ""
        self._window.append(token)
        self._fresh += 1
        text = self._decode(self._window)
        if not text.endswith(BROKEN):
            return self._whole(text)
        if self._fresh < LONGEST_CHARACTER:
            return ""
        # Only the last of so many bytes can still be the beginning of a character.
        piece = text[self._given : -1]
        self._given = max(self._given, len(text) - 1)
        if len(self._window) > WINDOW:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """What was held back."""
        return self._decode(self._window)[self._given :]

    def _whole(self, text: str) -> str:
        piece = text[self._given :]
        if piece:
            self._window = self._window[-self._fresh :]
            self._given = len(self._decode(self._window))
            self._fresh = 0
        return piece

    def _shorten(self, text: str) -> None:
        """Let go of as many tokens as decode the same without those that follow."""
        for cut in range(len(self._window) - LONGEST_CHARACTER, 0, -1):
            tail = self._decode(self._window[cut:])
            if self._decode(self._window[:cut]) + tail == text:
                self._window = self._window[cut:]
                self._given = len(tail) - 1
                self._fresh = len(self._window)
                return

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text


class StopStrings:
    """Ends a text before the stop string that is complete first, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain not to belong to a stop string. Nothing more comes once ``found`` is set."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        border = len(text) - self._beginning(text)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """What was held back: the beginning of a stop string that never came."""
        return self._held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max(min(len(stop) - 1, len(text)) for stop in self._stops)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
