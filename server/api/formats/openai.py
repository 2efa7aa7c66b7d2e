"""OpenAIFormat: what chat completions and completions have in common on the wire."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, ClassVar

from server.api.formats.answer import Answer
from server.api.formats.format import comment, event
from server.api.generation.generation import Generation
from server.api.generation.pieces import Finish, Piece
from server.api.http.errors import error_body
from server.api.schemas.generation import GenerationRequest, StreamOptions
from server.text.token_text import TokenTexts

DONE = b"data: [DONE]\n\n"
UNFINISHED: Mapping[str, Any] = {"finish_reason": None}
_PLACEHOLDER = "\0text\0"
"""Marks the text's place in a chunk's template. It occurs nowhere else in a chunk, for names may not contain NUL."""


class OpenAIFormat(ABC):
    """Chunks with choices, which differ by endpoint in the fields of a choice."""

    full_object: ClassVar[str]
    """``object`` of a whole answer."""
    chunk_object: ClassVar[str]
    """``object`` of a stream's chunk."""

    def __init__(self, answer: Answer, request: GenerationRequest, texts: TokenTexts) -> None:
        self.answer = answer
        self.texts = texts
        self.returns_token_ids = bool(request.return_token_ids)
        self.top_logprobs = request.token_logprobs
        """With each token, return the log probabilities of this many most likely tokens; None returns none."""
        self.prompt_logprobs = request.prompt_logprobs
        """The same for the prompt's tokens."""
        options = request.stream_options or StreamOptions()
        self._continuous_usage = options.continuous_usage_stats
        self._include_usage = options.include_usage or self._continuous_usage
        self._progress = options.progress
        self._chunk_head = answer.head(self.chunk_object) | ({"usage": None} if self._include_usage else {})
        self._templates: dict[int, list[bytes]] = {}

    @property
    def generation(self) -> Generation:
        """The request whose answer this writes."""
        return self.answer.generation

    # What differs by endpoint

    @abstractmethod
    def full_choices(self, answers: Seq[Piece]) -> list[dict[str, Any]]:
        """Return the choices of a whole answer."""

    @abstractmethod
    def push(self, index: int, piece: Piece) -> bytes:
        """Return the chunks of a piece."""

    @abstractmethod
    def text_choice(self, text: str) -> Mapping[str, Any]:
        """Return the fields of a choice in a chunk that has only text."""

    def full_fields(self) -> dict[str, Any]:
        """Return further fields of a whole answer."""
        return {}

    # What does not

    def body(self, answers: Seq[Piece]) -> Mapping[str, Any]:
        """Return the whole answer."""
        return {
            **self.answer.head(self.full_object),
            "choices": self.full_choices(answers),
            "usage": self.answer.usage(),
            **self.full_fields(),
            **self.answer.explanation(),
        }

    def begin(self) -> bytes:
        """Return the chunks that open a stream."""
        return b""

    def end(self) -> bytes:
        """Return the chunk with the usage, and where the time went, if the request asks for them; and ``[DONE]``."""
        last = {"usage": self.answer.usage()} if self._include_usage else {}
        last |= self.answer.explanation()
        return (event({**self._chunk_head, "choices": [], **last}) if last else b"") + DONE

    def error(self, error: Exception) -> bytes:
        """Return an event with an error object. No ``[DONE]`` follows."""
        return event(error_body(error)[1])

    def waiting(self) -> bytes:
        """Return a comment, or the progress of the prompt if the request asks for it."""
        progress = self.generation.progress
        if self._progress and self.generation.first_token is None:
            return event({**self._chunk_head, "choices": [], "prompt_progress": progress._asdict()})
        return comment(f"waiting, {progress.processed} of {progress.total} prompt tokens computed")

    def text_chunk(self, index: int, text: str) -> bytes:
        """Return a chunk that has only text."""
        if self._continuous_usage:
            return self.chunk(index, self.text_choice(text))
        template = self._templates.get(index)
        if template is None:
            # Only the text differs between chunks. Dumping each chunk as a whole would take CPU time from the engine.
            chunk = self.chunk(index, self.text_choice(_PLACEHOLDER))
            template = self._templates[index] = chunk.split(json.dumps(_PLACEHOLDER).encode())
        return json.dumps(text).encode().join(template)

    def chunk(
        self,
        index: int,
        fields: Mapping[str, Any],
        finish: Mapping[str, Any] = UNFINISHED,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Return a chunk of one choice.

        ``finish`` are the fields that say why it ended, in its last chunk; ``more`` are fields of the chunk.
        """
        usage = {"usage": self.answer.usage()} if self._continuous_usage else {}
        choice = {"index": index, **fields, "logprobs": fields.get("logprobs"), **finish}
        return event({**self._chunk_head, **usage, "choices": [choice], **(more or {})})


def finish_fields(finish: Finish | None, reason: str | None = None) -> dict[str, Any]:
    """Return why a choice ended: OpenAI's reason, and vLLM's ``stop_reason``. ``reason`` replaces OpenAI's."""
    assert finish is not None, "the choice has not ended"
    return {"finish_reason": reason or finish.reason, "stop_reason": finish.stop}
