"""ChatFormat: answers of ``POST /v1/chat/completions``."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from server.api.formats.answer import Answer
from server.api.formats.format import read_deltas
from server.api.formats.logprobs import chat_logprobs, prompt_logprobs
from server.api.formats.openai import UNFINISHED, OpenAIFormat, finish_fields
from server.api.generation.pieces import Piece
from server.api.schemas.chat import ChatRequest
from server.parsers.deltas import ContentDelta, Delta, MessageParser, PlainText, ReasoningDelta
from server.text.token_text import TokenTexts


class ChatFormat(OpenAIFormat):
    """Messages of the assistant, split into deltas by a parser for each choice."""

    full_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        answer: Answer,
        request: ChatRequest,
        texts: TokenTexts,
        make_parser: Callable[[], MessageParser] = PlainText,
    ) -> None:
        super().__init__(answer, request, texts)
        self._parsers = [make_parser() for _ in answer.generation.choices]
        parses = any(not isinstance(parser, PlainText) for parser in self._parsers)
        self._plain = not parses and self.top_logprobs is None and not self.returns_token_ids
        """Whether chunks have only text."""
        self._prompt = answer.generation.choices[0].prompt

    def text_choice(self, text: str) -> Mapping[str, Any]:
        """Return a delta of content."""
        return {"delta": {"content": text}}

    # A whole answer

    def full_choices(self, answers: Seq[Piece]) -> list[dict[str, Any]]:
        """Return the messages."""
        return [self._full_choice(index, answer) for index, answer in enumerate(answers)]

    def _full_choice(self, index: int, answer: Piece) -> dict[str, Any]:
        parser = self._parsers[index]
        deltas = read_deltas(parser, answer)
        finish = finish_fields(answer.finish, _finish_reason(parser, answer))
        fields = {"message": message(deltas), "logprobs": self._logprobs(answer), **self._token_ids(answer)}
        return {"index": index, **fields, **finish}

    def full_fields(self) -> dict[str, Any]:
        """Return vLLM's fields about the prompt."""
        fields: dict[str, Any] = {"prompt_token_ids": self._prompt} if self.returns_token_ids else {}
        if self.prompt_logprobs is not None:
            found = self.generation.choices[0].prompt_logprobs or ()
            fields["prompt_logprobs"] = prompt_logprobs(self._prompt, found, self.prompt_logprobs, self.texts)
        return fields

    # A stream

    def begin(self) -> bytes:
        """Return a chunk with the role for each choice."""
        opening = {"delta": {"role": "assistant", "content": ""}}
        more = {"prompt_token_ids": self._prompt} if self.returns_token_ids else {}
        return b"".join([self.chunk(index, opening, more=more) for index in range(len(self._parsers))])

    def push(self, index: int, piece: Piece) -> bytes:
        """Return a chunk for each delta, and a last one with an empty delta. The first has the tokens' fields."""
        if self._plain and not piece.finish:
            return self.text_chunk(index, piece.text) if piece.text else b""
        parser = self._parsers[index]
        deltas = read_deltas(parser, piece)
        about_tokens = self._token_fields(piece)
        if not about_tokens:
            chunks = [self._delta_chunk(index, delta) for delta in deltas]
        else:
            fields = [delta_fields(delta) for delta in deltas] or [{"content": ""}]
            chunks = [self.chunk(index, {"delta": fields[0], **about_tokens})]
            chunks += [self.chunk(index, {"delta": more}) for more in fields[1:]]
        if piece.finish:
            chunks.append(self.chunk(index, {"delta": {}}, finish_fields(piece.finish, _finish_reason(parser, piece))))
        return b"".join(chunks)

    def _delta_chunk(self, index: int, delta: Delta) -> bytes:
        if isinstance(delta, ContentDelta):
            return self.text_chunk(index, delta.text)
        return self.chunk(index, {"delta": delta_fields(delta)}, UNFINISHED)

    def _token_fields(self, piece: Piece) -> dict[str, Any]:
        """Return the fields of a choice about the tokens of a piece, if the request asks for them."""
        has_logprobs = self.top_logprobs is not None and len(piece.tokens) > piece.hidden
        return ({"logprobs": self._logprobs(piece)} if has_logprobs else {}) | self._token_ids(piece)

    def _logprobs(self, piece: Piece) -> Any:
        if self.top_logprobs is None:
            return None
        shown = len(piece.tokens) - piece.hidden
        return chat_logprobs(piece.tokens[:shown], piece.logprobs[:shown], self.top_logprobs, self.texts)

    def _token_ids(self, piece: Piece) -> dict[str, Any]:
        return {"token_ids": list(piece.tokens)} if self.returns_token_ids and piece.tokens else {}


def delta_fields(delta: Delta) -> dict[str, Any]:
    """Return a delta as OpenAI writes it. ``reasoning_content`` is DeepSeek's name, ``reasoning`` a later one."""
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning_content": delta.text, "reasoning": delta.text}
    if delta.id is None:
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}


def message(deltas: Seq[Delta]) -> dict[str, Any]:
    """Return the assistant's message that these deltas make. ``content`` is null if it has only tool calls."""
    content = "".join([delta.text for delta in deltas if isinstance(delta, ContentDelta)])
    reasoning = "".join([delta.text for delta in deltas if isinstance(delta, ReasoningDelta)])
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if isinstance(delta, ContentDelta | ReasoningDelta):
            continue
        function = {"name": delta.name, "arguments": ""}
        call = calls.setdefault(delta.index, {"id": delta.id, "type": "function", "function": function})
        call["function"]["arguments"] += delta.arguments
    made: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    if reasoning:
        made["reasoning_content"] = made["reasoning"] = reasoning
    if calls:
        made["tool_calls"] = list(calls.values())
    return made


def _finish_reason(parser: MessageParser, piece: Piece) -> str | None:
    """``tool_calls`` for a complete message that has some; else None, for the reason of the piece."""
    assert piece.finish is not None
    return "tool_calls" if parser.has_tool_calls and piece.finish.reason == "stop" else None
