"""Conversations to token ids and labels.

A conversation is rendered whole with the chat template and encoded once, as the server encodes a prompt. Where an
answer begins is found by rendering the turns before it as the server would, and that prompt must be the beginning of
the whole, as text. What is trained is, token by token, what will be served: where a token of the whole would straddle
the border, as where an answer begins with a line break, prompt and answer are encoded apart. An earlier answer of that
kind becomes an example of its own, for in the prompts of later turns the server encodes it with what stands before it.
An answer ends with the first end-of-turn token after its beginning, which is trained; what the template writes after it
is not. Labels come from these positions alone, so it does not matter whether that token also pads.
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
from training.data.tools import Message, in_python, shapes

UNTRAINED = -100
"""The label of a token that the loss ignores, as torch's cross entropy has it."""
_WORDS = ("Marmalade", "Zeppelin")
"""Stand for answers where a template is asked how it ends them."""


@dataclass(frozen=True)
class Example:
    """One row as the model gets it."""

    input_ids: list[int]
    labels: list[int]
    """The ids themselves, or UNTRAINED. The first is never trained: nothing comes before it."""
    source: str
    prompt_length: int
    """Tokens up to the last answer; 0 where the row has no prompt, or that answer is not trained or was cut off."""
    answer: str
    """The last answer as a server would give it, tool calls as the template writes them; empty without a prompt."""
    row: Conversation | None = None
    """What it was made from; None where it was made of nothing."""

    @property
    def prompt(self) -> list[int]:
        """What the server would be asked."""
        return self.input_ids[: self.prompt_length]

    @property
    def trained(self) -> int:
        """Tokens that the loss is taken on."""
        return len(self.labels) - self.labels.count(UNTRAINED)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of ids and labels."""
        return hashlib.sha256(np.asarray([self.input_ids, self.labels], "<i4").tobytes()).digest()

    def cut(self, length: int) -> "Example":
        """The first ``length`` tokens."""
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
    """The texts of a row: of its whole, and of the prompts within it that the server would be asked."""

    row: Conversation
    whole: str
    prompts: tuple[str, ...] = ()

    @property
    def special(self) -> bool:
        """Whether the tokenizer adds its tokens to it, as to plain prompts."""
        return not self.row.turns


class Renderer:
    """A tokenizer and a chat template. Raises DataError, with the row, for what cannot be rendered exactly."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        """``chat_template`` is used instead of the tokenizer's own."""
        self._tokenizer = tokenizer
        self._template = chat_template
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer's file may ask for both; the server asks for neither.
        self._backend.no_truncation()
        self._backend.no_padding()
        # The ids of a hundred thousand rows are kept as references to one int for each token.
        self._ids = list(range(max(self._backend.get_vocab().values()) + 1))
        chats = chat_template is not None or tokenizer.chat_template is not None
        self.end_of_turn: int | None = self._find_end_of_turn() if chats else None
        """The token with which the chat template ends an answer; None where there is no template."""
        self._end_text: str = self._backend.id_to_token(self.end_of_turn) if self.end_of_turn is not None else ""

    def render(self, conversation: Conversation) -> Example:
        """One row, or its last example where it makes several; many rows are faster together."""
        return self.render_all([conversation])[-1]

    def render_all(self, conversations: Sequence[Conversation], on_error: OnRowError = raise_error) -> list[Example]:
        """The examples of all rows, in order, encoded in parallel; ``refuse`` gets those that cannot be rendered."""
        rendered: list[Rendered] = []
        for conversation in conversations:
            try:
                rendered.append(self._rendered(conversation))
            except DataError as error:
                on_error(error)
        encoded = self._encode([(text, row.special) for row in rendered for text in (row.whole, *row.prompts)])
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
        """The ids of each text, with the tokens that the tokenizer adds to plain prompts, or without."""
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
                reason = f"the assistant's turn {index + 1} has {self._end_text} in its text, which would end it there"
                raise DataError(reason, row.source)
            prompt = self._apply(messages[:index], row, prompt=True)
            if not whole.startswith(prompt):
                reason = (
                    f"the prompt of turn {index + 1} is no prefix of the whole: the chat template writes it differently"
                )
                raise DataError(reason, row.source)
            prompts.append(prompt)
        return Rendered(row, whole, tuple(prompts))

    def _render_first_valid(self, row: Conversation) -> tuple[list[Message], str]:
        """The messages in the first shape that the template writes rightly, and what it writes."""
        errors: list[DataError] = []
        for messages in shapes([turn.message() for turn in row.turns]):
            try:
                whole = self._apply(messages, row)
                self._check_calls(messages, whole, row)
            except DataError as error:
                errors.append(error)
            else:
                return messages, whole
        raise min(errors, key=_accidental)

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
            raise DataError(f"the chat template refuses it: {error}", conversation.source or None) from error
        return str(text)

    def _check_tools(self, messages: list[Message], whole: str, row: Conversation) -> None:
        """A template that leaves tools out would train answers to questions nobody asked."""
        if row.tools and self._apply(messages, row, tools=False) == whole:
            raise DataError("it has `tools`, which the chat template does not know", row.source)

    def _check_calls(self, messages: list[Message], whole: str, row: Conversation) -> None:
        """Whether the template writes all calls, and their arguments as JSON."""
        if in_python(messages, whole):
            raise DataError("the chat template writes the arguments of its `tool_calls` in no JSON", row.source)
        for index, message in enumerate(messages):
            if "tool_calls" not in message:
                continue
            others = [*messages]
            others[index] = {**message, "content": message["content"] or "", "tool_calls": None}
            if self._apply(others, row) == whole:
                raise DataError("it has `tool_calls`, which the chat template does not know", row.source)

    def _chat_examples(self, row: Rendered, whole: list[int], prompts: list[list[int]]) -> list[Example]:
        """All answers in one example, but for those that melt with their prompts and are not the last trained one."""
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
        """The ids of the whole, beginning with those of a prompt in it: encoded apart where a token straddles them.

        Raises DataError where the tokenizer has no ids for what follows that read as it does there.
        """
        if whole[: len(prompt)] == prompt:
            return whole
        rest = row.whole[len(text) :]
        read = self._decode(whole)
        # Some tokenizers put a space before a text's first word, but not after a special token; others let a special
        # token swallow the white space after it.
        anchor = self._end_text or self._tokenizer.eos_token
        for before in (anchor, ""):
            anchors = next(self._encode([(before, False)])) if before else []
            (found,) = self._encode([(before + rest, False)])
            if found[: len(anchors)] == anchors and self._decode(prompt + found[len(anchors) :]) == read:
                return prompt + found[len(anchors) :]
        raise DataError("the tokenizer cannot encode an answer of it apart from its prompt", row.row.source)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _end(self, whole: list[int], start: int, conversation: Conversation, index: int) -> int:
        """Where the answer that begins at ``start`` ends: past its end-of-turn token."""
        assert self.end_of_turn is not None
        try:
            return whole.index(self.end_of_turn, start) + 1
        except ValueError:
            reason = f"the chat template does not end turn {index + 1} with {self._end_text}"
            raise DataError(reason, conversation.source) from None

    def _text_example(self, row: Rendered, whole: list[int], prompts: list[list[int]]) -> Example:
        """``prompt``, ``text`` and the tokenizer's eos.

        The prompt's ids are those that the server will see, also where both together are encoded otherwise, as "2+" and
        "+3" are where there is a token "++".
        """
        eos = self._tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise DataError("the tokenizer has no eos token to end a text with", row.row.source)
        prompt = prompts[0] if prompts else []
        if prompts:
            whole = self._joined(row, whole, row.prompts[0], prompt)
        whole = whole if whole[-1:] == [eos] else [*whole, self._ids[eos]]
        # Nothing comes before the first token that could foretell it.
        untrained = max(len(prompt), 1)
        labels = [UNTRAINED] * untrained + whole[untrained:]
        answer = self._backend.decode(whole[len(prompt) :]) if prompt else ""
        return Example(whole, labels, row.row.source, len(prompt), answer, row.row)

    def _find_end_of_turn(self) -> int:
        """The token after each answer of a made-up conversation. Raises DataError where they differ or are none."""
        turns = [turn for word in _WORDS for turn in (Turn("user", "Say a word."), Turn("assistant", word))]
        text = self._apply([turn.message() for turn in turns], Conversation("", tuple(turns)))
        encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
        control = {*self._backend.get_added_tokens_decoder(), *self._tokenizer.all_special_ids}
        found = set()
        for word in _WORDS:
            if word not in text:
                raise DataError("the chat template leaves out what the assistant says")
            place = text.index(word) + len(word)
            after = zip(encoding.ids, encoding.offsets, strict=True)
            found.add(next((token for token, (start, _) in after if start >= place and token in control), None))
        end = found.pop()
        if found or end is None:
            raise DataError("the chat template ends the assistant's turns with no special token of their own")
        return int(end)


def _accidental(error: DataError) -> bool:
    """Whether it says only what Python or Jinja stumbled over in a shape that the template was not made for.

    What is found out here, or what the template itself says, tells more.
    """
    cause = error.__cause__
    return isinstance(cause, UndefinedError) or not isinstance(cause, TemplateError | None)


def _answers(conversation: Conversation) -> list[int]:
    """Places of the turns that are trained."""
    return [index for index, turn in enumerate(conversation.turns) if turn.trained]
