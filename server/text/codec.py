"""Codec: prompts and conversations to token ids."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidRequest
from server.parsers.tool_formats import ToolFormat
from server.text.chat_template import ChatTemplate, Render, TemplateSources, find_sources
from server.text.control_tokens import ControlTokens
from server.text.conversation import Conversation
from server.text.infilling import find_infilling
from server.text.template_environment import render
from server.text.token_text import TokenTexts

LONG_TEXT = 8192
"""Characters from which callers encode on a thread, so that the event loop's other requests do not stall."""


class RenderedChat(NamedTuple):
    """A conversation as a prompt."""

    text: str
    tokens: list[int]


class Codec:
    """Encodes prompts and conversations with a base's tokenizer. Any thread may use it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        context: int | None = None,
        *,
        chat_template: str | None = None,
        tool_format: ToolFormat | None = None,
    ) -> None:
        """``vocabulary`` is the number of the model's token ids, which may be more than the tokenizer has.

        With ``context``, text that is too long to fit as many tokens is refused before it is encoded.
        ``chat_template`` replaces the tokenizer's; ``tool_format`` is how tool calls are written, whatever a template
        says.
        """
        self.vocabulary = vocabulary
        self._context = context
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer's file may turn these on; either would change prompts silently.
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        unknown = range(self.backend.get_vocab_size(), vocabulary)
        self.special = frozenset(token for token, content in added.items() if content.special)
        """Ids of special tokens."""
        self.textless = self.special.union(unknown)
        """Token ids without text: special tokens, and ids that the tokenizer does not have."""
        self.infilling = find_infilling({str(content): token for token, content in added.items()})
        """How the model fills in the middle, None if it has no tokens for that."""
        self._tokenizer = tokenizer
        self._max_token_characters = max(map(len, self.backend.get_vocab()))
        """Characters."""
        self._tool_format = tool_format
        self._control_tokens = ControlTokens(self.backend)
        sources = find_sources(chat_template or tokenizer.chat_template)
        self.template = None if sources is None else self.make_template(sources, render)
        """The base's chat template, None if it has none."""

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Text and bytes of single tokens."""
        return TokenTexts(self.backend, self.textless)

    def render_chat(self, chat: Conversation, template: ChatTemplate) -> "RenderedChat":
        """Return the text and the token ids of a conversation. Raises InvalidRequest.

        The text of special tokens in the messages stays text, unless the conversation says otherwise.
        """
        marked, marks = chat, None
        if not chat.special_tokens_in_content:
            marked, marks = self._control_tokens.marked(chat, template.source)
        text = template.render(marked)
        self._check_length(text, "messages")
        if marks is None:
            return RenderedChat(text, self._encode(text, "messages", special=False))
        tokens = self._control_tokens.encode(text, marks)
        return RenderedChat(marks.removed(text), _require_tokens(tokens, "messages"))

    def is_quick(self, chat: Conversation) -> bool:
        """Whether a short conversation is encoded at once: without text of special tokens that has to stay text."""
        if self.template is None or chat.special_tokens_in_content:
            return True
        return not self._control_tokens.occur_in(chat, self.template.source)

    def require_template(self) -> ChatTemplate:
        """Return the base's chat template. Raises InvalidRequest if it has none."""
        if self.template is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
        return self.template

    def make_template(self, sources: TemplateSources, render: Render) -> ChatTemplate:
        """Return a template with the variables of this tokenizer."""
        names = self._tokenizer.special_tokens_map
        special = {name: str(text) for name, text in names.items() if name != "additional_special_tokens"}
        return ChatTemplate(sources, render, special, self._tool_format)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token with this text, None if there is none."""
        return next(iter(self.special_ids([text])), None)

    def special_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Return the ids of those of ``texts`` that are special tokens."""
        found = {self.backend.token_to_id(text) for text in texts}
        return self.textless.intersection(token for token in found if token is not None)

    def encode_prompt(self, prompt: str | Sequence[int], param: str = "prompt", *, special: bool = True) -> list[int]:
        """Return the token ids of a prompt. A prompt of token ids is returned as it is, if the model has them all.

        ``param`` is the request's field that an error names; ``special``: add the special tokens with which the
        tokenizer begins or ends a text.
        """
        if isinstance(prompt, str):
            return self._encode(prompt, param, special=special)
        for token in prompt:
            if not 0 <= token < self.vocabulary:
                raise InvalidRequest(f"Token ids are 0 to {self.vocabulary - 1}; {token} is not.", param=param)
        return _require_tokens(list(prompt), param)

    def encode_infilling(self, prefix: str | Sequence[int], suffix: str) -> list[int]:
        """Return the token ids of a prompt for the text between ``prefix`` and ``suffix``.

        Raises InvalidRequest if the model cannot fill in the middle.
        """
        if self.infilling is None:
            raise InvalidRequest(
                "`suffix` is not supported by this model: its tokenizer has no tokens for filling in the middle.",
                param="suffix",
                code="unsupported_parameter",
            )
        self._check_length(suffix, "suffix")
        first = self._ids("", special=True)
        before = self.encode_prompt(prefix, special=False) if prefix else []
        tokens = self.infilling.join(before, suffix, lambda text: self._ids(text, special=False))
        return [*(token for token in first if token == self._tokenizer.bos_token_id), *tokens]

    def text_of(self, prompt: str | Sequence[int]) -> str:
        """Return the text of a prompt, special tokens included."""
        if isinstance(prompt, str):
            return prompt
        return str(self.backend.decode_batch([list(prompt)], skip_special_tokens=False)[0])

    def _encode(self, text: str, param: str, *, special: bool) -> list[int]:
        self._check_length(text, param)
        return _require_tokens(self._ids(text, special=special), param)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # Unlike encode, encode_batch releases the GIL.
        ids: list[int] = self.backend.encode_batch([text], add_special_tokens=special)[0].ids
        return ids

    def _check_length(self, text: str, param: str) -> None:
        if self._context is not None and len(text) > self._context * self._max_token_characters:
            raise InvalidRequest(
                f"This model's maximum context length is {self._context} tokens. However, your prompt has {len(text)} "
                "characters, which are more tokens than that.",
                param=param,
                code="context_length_exceeded",
            )


def _require_tokens(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    return ids
