"""Codec: prompts and conversations to token ids."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidRequest


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
