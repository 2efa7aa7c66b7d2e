"""CompletionFormat: answers of ``POST /v1/completions``."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from server.api.formats.answer import Answer
from server.api.formats.logprobs import CompletionLogprobs, MaybeLogprobs, prompt_logprobs
from server.api.formats.openai import UNFINISHED, OpenAIFormat, finish_fields
from server.api.generation.pieces import Piece
from server.api.schemas.completion import CompletionRequest
from server.text.token_text import TokenTexts


class CompletionFormat(OpenAIFormat):
    """Continuations of prompts."""

    full_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, answer: Answer, request: CompletionRequest, texts: TokenTexts, echoes: Seq[str]) -> None:
        """``echoes`` are the texts of the prompts, if the request asks to repeat them; else empty."""
        super().__init__(answer, request, texts)
        self._echoes = echoes
        self._samples = answer.generation.choices_per_prompt
        self._choices = request.choices
        choices = range(len(answer.generation.choices))
        self._fresh = set(choices)
        """Choices of a stream that have no chunk yet."""
        self._logprobs: list[CompletionLogprobs] | None = None
        if self.top_logprobs is not None:
            kept = answer.generation.kept
            self._logprobs = [CompletionLogprobs(self.top_logprobs, texts, kept) for _ in choices]

    def text_choice(self, text: str) -> Mapping[str, Any]:
        """Return the text."""
        return {"text": text}

    # A whole answer

    def full_choices(self, answers: Seq[Piece]) -> list[dict[str, Any]]:
        """Return the choices of all prompts: of each the best ones, if more were generated than asked for."""
        chosen: list[int] = []
        for start in range(0, len(answers), self._samples):
            samples = list(range(start, start + self._samples))
            if self._choices < self._samples:
                samples = sorted(samples, key=lambda index: mean_logprob(answers[index]), reverse=True)[: self._choices]
            chosen += samples
        return [
            {"index": number, **self._full_choice(index, answers[index]), **finish_fields(answers[index].finish)}
            for number, index in enumerate(chosen)
        ]

    def _full_choice(self, index: int, answer: Piece) -> dict[str, Any]:
        opening, fields = self._opening(index), self._token_fields(index, answer)
        text = opening.pop("text", "") + answer.text
        if "logprobs" in opening and "logprobs" in fields:
            fields["logprobs"] = {name: first + fields["logprobs"][name] for name, first in opening["logprobs"].items()}
        choice = {"text": text, "logprobs": None, **opening, **fields}
        if self.prompt_logprobs is not None:
            tokens, found = self._prompt(index)
            choice["prompt_logprobs"] = prompt_logprobs(tokens, found, self.prompt_logprobs, self.texts)
        return choice

    # A stream

    def push(self, index: int, piece: Piece) -> bytes:
        """Return a chunk with the text, if there is some, and a last one without."""
        chunk = b""
        if index in self._fresh:
            self._fresh.discard(index)
            if opening := self._opening(index):
                chunk = self.chunk(index, {"text": "", **opening})
        fields = self._token_fields(index, piece)
        if fields:
            chunk += self.chunk(index, {"text": piece.text, **fields}, UNFINISHED)
        elif piece.text:
            chunk += self.text_chunk(index, piece.text)
        if piece.finish:
            chunk += self.chunk(index, {"text": ""}, finish_fields(piece.finish))
        return chunk

    # Both

    def _opening(self, index: int) -> dict[str, Any]:
        """Return the fields of a choice about its prompt, if the request asks for them."""
        fields: dict[str, Any] = {}
        if self._echoes:
            fields["text"] = echo = self._echoes[index // self._samples]
            if self._logprobs is not None:
                fields["logprobs"] = self._logprobs[index].take(*self._prompt(index), echo)
        if self.returns_token_ids:
            fields["prompt_token_ids"] = self._prompt_tokens(index)
        return fields

    def _token_fields(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the fields of a choice about the tokens of a piece, if the request asks for them."""
        fields: dict[str, Any] = {}
        if self._logprobs is not None and piece.tokens:
            by_string = piece.finish is not None and isinstance(piece.finish.stop, str)
            shown = len(piece.tokens) - (piece.hidden if by_string else 0)  # a stop token is shown, as in vLLM
            fields["logprobs"] = self._logprobs[index].take(piece.tokens[:shown], piece.logprobs[:shown])
        if self.returns_token_ids and piece.tokens:
            fields["token_ids"] = list(piece.tokens)
        return fields

    def _prompt_tokens(self, index: int) -> list[int]:
        return self.generation.choices[index].prompt

    def _prompt(self, index: int) -> tuple[list[int], Seq[MaybeLogprobs]]:
        """Return a choice's prompt and its log probabilities, which only one choice of each prompt may have."""
        choices = self.generation.choices
        found = choices[index].prompt_logprobs or choices[index - index % self._samples].prompt_logprobs
        assert found is not None, "the engine returns them before the first token"
        return choices[index].prompt, found


def mean_logprob(answer: Piece) -> float:
    """Return the mean log probability of an answer's tokens, by which ``best_of`` compares."""
    return sum(its.logprob for its in answer.logprobs) / max(len(answer.logprobs), 1)
