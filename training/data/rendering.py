"""Renders conversations to token ids and labels.

A whole conversation is rendered with the chat template and encoded once, as the server encodes a prompt. To find where
an answer begins, the turns before it are rendered as the server would; that prompt must be a prefix of the whole text.
Training and serving see the same tokens: if a token would straddle the border of prompt and answer, as when an answer
begins with a line break, the two are encoded separately. If this is not the last answer, it becomes an example of its
own, because in the prompts of later turns the server encodes it together with the text before it.
An answer ends with the first end-of-turn token after its beginning. That token is trained; what the template writes
after it is not. Labels depend only on these positions, so the end-of-turn token may also be the padding token.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError, UndefinedError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from training.data.conversation import Conversation, DataError, OnRowError, Turn, raise_error
from training.data.tools import Message, message_forms, written_in_python

UNTRAINED = -100
"""Label of tokens that the loss ignores; the default ``ignore_index`` of torch's cross entropy."""
_WORDS = ("Marmalade", "Zeppelin")
"""Placeholder answers for finding out how a template ends answers."""


@dataclass(frozen=True)
class Example:
    """One tokenized row."""

    input_ids: list[int]
    labels: list[int]
    """The ids, or UNTRAINED. The first token is never trained, since nothing precedes it."""
    source: str
    prompt_length: int
    """Number of tokens before the last answer; 0 if there is no prompt, or that answer is untrained or truncated."""
    answer: str
    """The last answer as a server would give it, tool calls as the template writes them; empty without a prompt."""
    row: Conversation | None = None
    """The conversation that the example was rendered from, if any."""

    @property
    def prompt(self) -> list[int]:
        """The token ids that the server would be asked to continue."""
        return self.input_ids[: self.prompt_length]

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return len(self.labels) - self.labels.count(UNTRAINED)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of ids and labels."""
        return hashlib.sha256(np.asarray([self.input_ids, self.labels], "<i4").tobytes()).digest()

    def cut(self, length: int) -> "Example":
        """Return the example truncated to ``length`` tokens."""
        whole = len(self.input_ids) <= length
        return Example(
            self.input_ids[:length],
            self.labels[:length],
            self.source,
            self.prompt_length if whole else 0,
            self.answer if whole else "",
            self.row,
        )


@dataclass(frozen=True, slots=True)
class Rendered:
    """The texts of a row: the whole, and the prompt of each trained answer."""

    row: Conversation
    whole: str
    prompts: tuple[str, ...] = ()

    @property
    def add_special_tokens(self) -> bool:
        """Whether the tokenizer adds special tokens: to plain text, not to chats, whose template writes them."""
        return not self.row.turns


class Renderer:
    """Renders rows with a tokenizer and a chat template. Raises DataError for rows that cannot be rendered exactly."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        """``chat_template`` is used instead of the tokenizer's own."""
        self._tokenizer = tokenizer
        self._template = chat_template
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer's file may enable both; the server uses neither.
        self._backend.no_truncation()
        self._backend.no_padding()
        # One shared int object per token id, which saves memory over many rows.
        self._ids = list(range(max(self._backend.get_vocab().values()) + 1))
        chats = chat_template is not None or tokenizer.chat_template is not None
        self.end_of_turn: int | None = self._find_end_of_turn() if chats else None
        """The token with which the chat template ends an answer; None without a chat template."""
        self._end_text: str = self._backend.id_to_token(self.end_of_turn) if self.end_of_turn is not None else ""

    def render(self, conversation: Conversation) -> Example:
        """Render one row; return its last example if it makes several. Many rows are faster in :meth:`render_all`."""
        return self.render_all([conversation])[-1]

    def render_all(self, conversations: Sequence[Conversation], on_error: OnRowError = raise_error) -> list[Example]:
        """Return the examples of all rows, in order, encoded in parallel; call ``on_error`` for rows that fail."""
        rendered: list[Rendered] = []
        for conversation in conversations:
            try:
                rendered.append(self._rendered(conversation))
            except DataError as error:
                on_error(error)
        encoded = self._encode(
            [(text, row.add_special_tokens) for row in rendered for text in (row.whole, *row.prompts)]
        )
        examples = []
        for row in rendered:
            whole, *prompts = [next(encoded) for _ in (row.whole, *row.prompts)]
            try:
                if row.row.turns:
                    examples += self._chat_examples(row, whole, prompts)
                else:
                    examples.append(self._text_example(row, whole, prompts))
            except DataError as error:
                on_error(error)
        return examples

    def _encode(self, pieces: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
        """Yield the ids of each (text, whether to add special tokens)."""
        ids: list[list[int]] = [[] for _ in pieces]
        for special in (False, True):
            places = [place for place, (_, wanted) in enumerate(pieces) if wanted is special]
            texts = [pieces[place][0] for place in places]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=special)
            for place, encoding in zip(places, encodings, strict=True):
                ids[place] = [self._ids[token] for token in encoding.ids]
        return iter(ids)

    def _rendered(self, row: Conversation) -> Rendered:
        if row.turns:
            return self._chat(row)
        if row.prompt is None:
            return Rendered(row, row.text or "")
        return Rendered(row, row.prompt + (row.text or ""), (row.prompt,))

    def _chat(self, row: Conversation) -> Rendered:
        if self.end_of_turn is None:
            raise DataError("the base has no chat template; give one with --chat-template", row.source)
        messages, whole = self._render_first_valid(row)
        self._check_tools(messages, whole, row)
        prompts = []
        for index in _answers(row):
            if self._end_text in row.turns[index].content:
                reason = f"the assistant's turn {index + 1} has {self._end_text} in its text, which would end the turn"
                raise DataError(reason, row.source)
            prompt = self._apply(messages[:index], row, prompt=True)
            if not whole.startswith(prompt):
                reason = (
                    f"the prompt of turn {index + 1} is not a prefix of the conversation, as the template renders it"
                )
                raise DataError(reason, row.source)
            prompts.append(prompt)
        return Rendered(row, whole, tuple(prompts))

    def _render_first_valid(self, row: Conversation) -> tuple[list[Message], str]:
        """Return the first of :func:`message_forms` that the template renders correctly, and its text."""
        errors: list[DataError] = []
        for messages in message_forms([turn.message() for turn in row.turns]):
            try:
                whole = self._apply(messages, row)
                self._check_calls(messages, whole, row)
            except DataError as error:
                errors.append(error)
            else:
                return messages, whole
        raise min(errors, key=_from_wrong_form)

    def _apply(
        self, messages: list[dict[str, Any]], conversation: Conversation, *, prompt: bool = False, tools: bool = True
    ) -> str:
        try:
            text: Any = self._tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools if tools else None,  # type: ignore[arg-type]
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(f"the chat template raised an error: {error}", conversation.source or None) from error
        return str(text)

    def _check_tools(self, messages: list[Message], whole: str, row: Conversation) -> None:
        """Raise DataError if the template ignores tools: the answers would not fit their prompts."""
        if row.tools and self._apply(messages, row, tools=False) == whole:
            raise DataError("the row has `tools`, which the chat template ignores", row.source)

    def _check_calls(self, messages: list[Message], whole: str, row: Conversation) -> None:
        """Raise DataError if the template ignores a call, or does not write arguments as JSON."""
        if written_in_python(messages, whole):
            raise DataError("the chat template does not write the arguments of `tool_calls` as JSON", row.source)
        for index, message in enumerate(messages):
            if "tool_calls" not in message:
                continue
            others = [*messages]
            others[index] = {**message, "content": message["content"] or "", "tool_calls": None}
            if self._apply(others, row) == whole:
                raise DataError("the row has `tool_calls`, which the chat template ignores", row.source)

    def _chat_examples(self, row: Rendered, whole: list[int], prompts: list[list[int]]) -> list[Example]:
        """Return an example for each earlier answer that shares a token with its prompt, then one with the others."""
        places = list(zip(_answers(row.row), row.prompts, prompts, strict=True))
        ids = self._joined(row, whole, row.prompts[-1], prompts[-1])
        labels = [UNTRAINED] * len(ids)
        alone, start, end = [], 0, 0
        for index, text, prompt in places:
            start = len(prompt)
            if ids[:start] == prompt:
                end = self._end(ids, start, row.row, index)
                labels[start:end] = ids[start:end]
            else:
                alone.append(self._answer_alone(row, index, prompt, self._joined(row, whole, text, prompt)))
        answered = row.row.turns[-1].trained
        answer = self._backend.decode(ids[start:end]) if answered else ""
        return [*alone, Example(ids, labels, row.row.source, start if answered else 0, answer, row.row)]

    def _answer_alone(self, row: Rendered, index: int, prompt: list[int], ids: list[int]) -> Example:
        start, end = len(prompt), self._end(ids, len(prompt), row.row, index)
        asked = replace(row.row, turns=row.row.turns[: index + 1])
        answer = self._backend.decode(ids[start:end])
        return Example(ids[:end], [UNTRAINED] * start + ids[start:end], row.row.source, start, answer, asked)

    def _joined(self, row: Rendered, whole: list[int], text: str, prompt: list[int]) -> list[int]:
        """Return the ids of the whole, starting with those of ``prompt``; encode the rest separately if necessary.

        Raises DataError if the separately encoded rest does not decode to the same text.
        """
        if whole[: len(prompt)] == prompt:
            return whole
        rest = row.whole[len(text) :]
        read = self._decode(whole)
        # Some tokenizers put a space before a text's first word, but not after a special token; others let a special
        # token strip the white space after it.
        anchor = self._end_text or self._tokenizer.eos_token
        for before in (anchor, ""):
            anchors = next(self._encode([(before, False)])) if before else []
            (found,) = self._encode([(before + rest, False)])
            if found[: len(anchors)] == anchors and self._decode(prompt + found[len(anchors) :]) == read:
                return prompt + found[len(anchors) :]
        raise DataError("the tokenizer cannot encode an answer separately from its prompt", row.row.source)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _end(self, whole: list[int], start: int, conversation: Conversation, index: int) -> int:
        """Return where the answer that begins at ``start`` ends, after its end-of-turn token. Raises DataError."""
        assert self.end_of_turn is not None
        try:
            return whole.index(self.end_of_turn, start) + 1
        except ValueError:
            reason = f"the chat template does not end turn {index + 1} with {self._end_text}"
            raise DataError(reason, conversation.source) from None

    def _text_example(self, row: Rendered, whole: list[int], prompts: list[list[int]]) -> Example:
        """Return an example of ``prompt``, ``text`` and the tokenizer's EOS token.

        The prompt has the ids that the server will see, even if both are encoded differently together, as "2+" and "+3"
        are if there is a token "++".
        """
        eos = self._tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise DataError("the tokenizer has no EOS token to end a text with", row.row.source)
        prompt = prompts[0] if prompts else []
        if prompts:
            whole = self._joined(row, whole, row.prompts[0], prompt)
        whole = whole if whole[-1:] == [eos] else [*whole, self._ids[eos]]
        # The first token cannot be predicted, since nothing precedes it.
        untrained = max(len(prompt), 1)
        labels = [UNTRAINED] * untrained + whole[untrained:]
        answer = self._backend.decode(whole[len(prompt) :]) if prompt else ""
        return Example(whole, labels, row.row.source, len(prompt), answer, row.row)

    def _find_end_of_turn(self) -> int:
        """Return the special token that ends answers in a sample conversation. Raises DataError if there is not one."""
        turns = [turn for word in _WORDS for turn in (Turn("user", "Say a word."), Turn("assistant", word))]
        text = self._apply([turn.message() for turn in turns], Conversation("", tuple(turns)))
        encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
        control = {*self._backend.get_added_tokens_decoder(), *self._tokenizer.all_special_ids}
        found = set()
        for word in _WORDS:
            if word not in text:
                raise DataError("the chat template leaves out the assistant's text")
            place = text.index(word) + len(word)
            after = zip(encoding.ids, encoding.offsets, strict=True)
            found.add(next((token for token, (start, _) in after if start >= place and token in control), None))
        end = found.pop()
        if found or end is None:
            raise DataError("the chat template does not end the assistant's turns with a special token")
        return int(end)


def _from_wrong_form(error: DataError) -> bool:
    """Return whether the error only comes from a message form that the template was not written for.

    Errors found here, or raised by the template itself, are more helpful.
    """
    cause = error.__cause__
    return isinstance(cause, UndefinedError) or not isinstance(cause, TemplateError | None)


def _answers(conversation: Conversation) -> list[int]:
    """Return the indices of the trained turns."""
    return [index for index, turn in enumerate(conversation.turns) if turn.trained]
