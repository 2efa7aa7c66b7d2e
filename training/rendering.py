"""Conversations to token ids and labels.

A conversation is rendered whole with the chat template and encoded once, as the server encodes a prompt. Where an
answer begins is found by rendering the turns before it as the server would, and both the text and the token ids of
that prompt must be the beginning of the whole's. So what is trained is, token by token, what will be served; a row
where a token would straddle the border is an error. An answer ends with the first end-of-turn token after its
beginning, which is trained; what the template writes after it is not. Labels come from these positions alone, so it
does not matter whether that token also pads.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from training.conversation import Conversation, DataError, Turn

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
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A text to encode, with the tokens a tokenizer adds to plain prompts (``special``) or without."""

    text: str
    special: bool


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
        """One row; many are faster together."""
        return self.render_all([conversation])[0]

    def render_all(self, conversations: Sequence[Conversation]) -> list[Example]:
        """An example for each row, in order, encoded in parallel."""
        pieces = [self._pieces(conversation) for conversation in conversations]
        encoded = self._encode([piece for of_row in pieces for piece in of_row])
        examples = []
        for conversation, of_row in zip(conversations, pieces, strict=True):
            ids = [next(encoded) for _ in of_row]
            examples.append(
                self._chat_example(conversation, ids) if conversation.turns else self._text_example(conversation, ids)
            )
        return examples

    def _encode(self, pieces: Sequence[Piece]) -> Iterator[list[int]]:
        ids: list[list[int]] = [[] for _ in pieces]
        for special in (False, True):
            places = [place for place, piece in enumerate(pieces) if piece.special is special]
            texts = [pieces[place].text for place in places]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=special)
            for place, encoding in zip(places, encodings, strict=True):
                ids[place] = [self._ids[token] for token in encoding.ids]
        return iter(ids)

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        """The texts whose ids make an example: first the whole, then the prompts within it."""
        if conversation.turns:
            return [Piece(text, special=False) for text in self._chat_texts(conversation)]
        text = conversation.text or ""
        if conversation.prompt is None:
            return [Piece(text, special=True)]
        prompt = conversation.prompt
        return [Piece(prompt + text, special=True), Piece(prompt, special=True), Piece(text, special=False)]

    def _chat_texts(self, conversation: Conversation) -> list[str]:
        if self.end_of_turn is None:
            raise DataError("the base has no chat template; give one with --chat-template", conversation.source)
        messages = [turn.message() for turn in conversation.turns]
        whole = self._apply(messages, conversation)
        self._check_calls(messages, whole, conversation)
        prompts = []
        for index in _answers(conversation):
            if self._end_text in conversation.turns[index].content:
                reason = f"the assistant's turn {index + 1} has {self._end_text} in its text, which would end it there"
                raise DataError(reason, conversation.source)
            prompt = self._apply(messages[:index], conversation, prompt=True)
            if not whole.startswith(prompt):
                reason = (
                    f"the prompt of turn {index + 1} is no prefix of the whole: the chat template writes it differently"
                )
                raise DataError(reason, conversation.source)
            prompts.append(prompt)
        return [whole, *prompts]

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

    def _check_calls(self, messages: list[dict[str, Any]], whole: str, conversation: Conversation) -> None:
        """A template that leaves tools or calls out would train answers to questions nobody asked."""
        if conversation.tools and self._apply(messages, conversation, tools=False) == whole:
            raise DataError("it has `tools`, which the chat template does not know", conversation.source)
        for index, message in enumerate(messages):
            if "tool_calls" not in message:
                continue
            others = [*messages]
            others[index] = {**message, "content": message["content"] or "", "tool_calls": None}
            if self._apply(others, conversation) == whole:
                raise DataError("it has `tool_calls`, which the chat template does not know", conversation.source)

    def _chat_example(self, conversation: Conversation, ids: list[list[int]]) -> Example:
        whole, *prompts = ids
        labels = [UNTRAINED] * len(whole)
        start = end = 0
        for index, prompt in zip(_answers(conversation), prompts, strict=True):
            start = len(prompt)
            if whole[:start] != prompt:
                reason = f"the beginning of turn {index + 1} melts into one token with the end of its prompt"
                raise DataError(f"{reason}; does it begin with white space?", conversation.source)
            end = self._end(whole, start, conversation, index)
            labels[start:end] = whole[start:end]
        if not conversation.turns[-1].trained:
            return Example(whole, labels, conversation.source, 0, "")
        return Example(whole, labels, conversation.source, start, self._backend.decode(whole[start:end]))

    def _end(self, whole: list[int], start: int, conversation: Conversation, index: int) -> int:
        """Where the answer that begins at ``start`` ends: past its end-of-turn token."""
        assert self.end_of_turn is not None
        try:
            return whole.index(self.end_of_turn, start) + 1
        except ValueError:
            reason = f"the chat template does not end turn {index + 1} with {self._end_text}"
            raise DataError(reason, conversation.source) from None

    def _text_example(self, conversation: Conversation, ids: list[list[int]]) -> Example:
        """``prompt``, ``text`` and the tokenizer's eos.

        Where the prompt's ids, which the server will see, do not begin those of both together, as for "2+" and
        "+3" with a token "++", each is encoded on its own.
        """
        eos = self._tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise DataError("the tokenizer has no eos token to end a text with", conversation.source)
        whole, prompt = ids[0], ids[1] if conversation.prompt is not None else []
        if whole[: len(prompt)] != prompt:
            whole = prompt + ids[2]
        whole = whole if whole[-1:] == [eos] else [*whole, self._ids[eos]]
        # Nothing comes before the first token that could foretell it.
        untrained = max(len(prompt), 1)
        labels = [UNTRAINED] * untrained + whole[untrained:]
        answer = self._backend.decode(whole[len(prompt) :]) if prompt else ""
        return Example(whole, labels, conversation.source, len(prompt), answer)

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


def _answers(conversation: Conversation) -> list[int]:
    """Places of the turns that are trained."""
    return [index for index, turn in enumerate(conversation.turns) if turn.trained]
