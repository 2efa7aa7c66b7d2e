"""Log probabilities in the shapes of chat completions, of completions and of vLLM's ``prompt_logprobs``."""

import codecs
from collections import deque
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from typing import Any

from server.engine.sequence import TokenLogprobs
from server.parsers.deltas import ContentDelta
from server.text.token_text import TokenTexts

LOWEST = -9999.0
"""What vLLM returns for a probability of 0, whose logarithm JSON cannot express."""

MaybeLogprobs = TokenLogprobs | None
"""None for the first token of a prompt, which nothing precedes."""


def chat_logprobs(tokens: Iterable[int], logprobs: Iterable[TokenLogprobs], count: int, texts: TokenTexts) -> Any:
    """Return the ``logprobs`` of a chat's choice: the ``bytes`` of all tokens are the bytes of the text.

    ``count`` is how many most likely tokens come with each.
    """
    content = [_chat_token(token, its, count, texts) for token, its in zip(tokens, logprobs, strict=True)]
    return {"content": content, "refusal": None}


def _chat_token(token: int, its: TokenLogprobs, count: int, texts: TokenTexts) -> dict[str, Any]:
    top = [_chat_entry(other, logprob, texts) for other, logprob in its.top[:count]]
    return {**_chat_entry(token, its.logprob, texts), "top_logprobs": top}


def _chat_entry(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": finite(logprob), "bytes": list(texts.data(token))}


class TokenPlaces:
    """Where in a text its tokens are, in characters. Give it each token in order."""

    def __init__(self, texts: TokenTexts, kept: Collection[int] = ()) -> None:
        """``kept`` are special tokens that have their text in it."""
        self._texts = texts
        self._kept = kept
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int, within: str | None = None) -> tuple[int, int]:
        """Return where a token begins and ends. Those that begin a character are empty; the last one has it.

        Where the text is known, it decides which special tokens have their text in it: a tokenizer may add others.
        """
        text, data = self._texts.text(token), self._texts.data(token)
        if token in self._kept if within is None else not data and within.startswith(text, self._characters):
            data = text.encode()
        if data and not 0x80 <= data[0] < 0xC0:  # it continues no character: bytes before it are invalid
            self._characters += len(self._decoder.decode(b"", final=True))
        start = self._characters
        self._characters += len(self._decoder.decode(data))
        return start, self._characters


class CompletionLogprobs:
    """The ``logprobs`` of one choice of a completion, whose offsets go on from chunk to chunk."""

    def __init__(self, count: int, texts: TokenTexts, kept: Collection[int]) -> None:
        """``count`` is how many most likely tokens come with each; ``kept`` as in :class:`TokenPlaces`."""
        self._count = count
        self._texts = texts
        self._places = TokenPlaces(texts, kept)

    def take(self, tokens: Seq[int], logprobs: Seq[MaybeLogprobs], within: str | None = None) -> dict[str, Any]:
        """Return the lists for the next tokens. ``within`` is the text that they are of, if it is known."""
        return {
            "tokens": [self._texts.text(token) for token in tokens],
            "token_logprobs": [None if its is None else finite(its.logprob) for its in logprobs],
            "top_logprobs": [self._top(token, its) for token, its in zip(tokens, logprobs, strict=True)],
            "text_offset": [self._places.next(token, within)[0] for token in tokens],
        }

    def _top(self, token: int, its: MaybeLogprobs) -> dict[str, float] | None:
        """Text -> log probability of the most likely tokens, and of the token itself."""
        if its is None:
            return None
        top = {self._texts.text(other): finite(logprob) for other, logprob in its.top[: self._count]}
        return top | {self._texts.text(token): finite(its.logprob)}


class ContentLogprobs:
    """The log probabilities of the tokens of an answer's content, which a parser finds in its text."""

    def __init__(self, count: int, texts: TokenTexts, kept: Collection[int]) -> None:
        """``count`` is how many most likely tokens come with each; ``kept`` as in :class:`TokenPlaces`."""
        self._count = count
        self._texts = texts
        self._places = TokenPlaces(texts, kept)
        self._waiting: deque[tuple[int, int, dict[str, Any]]] = deque()
        """Where each token begins and ends whose text the parser has not returned yet."""

    def push(self, tokens: Iterable[int], logprobs: Iterable[TokenLogprobs]) -> None:
        """Add the answer's next tokens."""
        for token, its in zip(tokens, logprobs, strict=True):
            self._waiting.append((*self._places.next(token), _chat_token(token, its, self._count, self._texts)))

    def take(self, delta: ContentDelta) -> list[dict[str, Any]]:
        """Return those of the tokens of ``delta``, as chats have them. Tokens before it are dropped."""
        found = []
        while self._waiting and self._waiting[0][0] < delta.start + len(delta.text):
            start, end, entry = self._waiting.popleft()
            if end > delta.start or start >= delta.start:
                found.append(entry)
        return found


def prompt_logprobs(tokens: Seq[int], logprobs: Seq[MaybeLogprobs], count: int, texts: TokenTexts) -> list[Any]:
    """Return vLLM's ``prompt_logprobs``: for each token, token id -> log probability, rank and text."""
    return [
        None if its is None else _prompt_entry(token, its, count, texts)
        for token, its in zip(tokens, logprobs, strict=True)
    ]


def _prompt_entry(token: int, its: TokenLogprobs, count: int, texts: TokenTexts) -> dict[str, Any]:
    ranked = [(other, logprob, rank) for rank, (other, logprob) in enumerate(its.top[:count], 1)]
    return {
        str(id_): {"logprob": finite(logprob), "rank": rank, "decoded_token": texts.text(id_)}
        for id_, logprob, rank in [(token, its.logprob, its.rank), *ranked]
    }


def finite(logprob: float) -> float:
    """Return a log probability that JSON can express."""
    return max(logprob, LOWEST)
