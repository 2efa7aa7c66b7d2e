"""PieceDecoder: the tokens of one choice to pieces of text, up to a stop string."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from server.api.generation.pieces import Finish, Piece
from server.engine.sequence import Token, TokenLogprobs
from server.text.codec import Codec
from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Where the text of an answer ends."""

    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """The request's own, without the model's end tokens."""
    include_stop: bool = False
    """Whether the stop string or stop token is part of the text."""
    min_tokens: int = 0
    """Tokens whose text is not searched for stop strings."""
    prompt_only: bool = False
    """Whether the answer is empty: the engine samples one token, which is dropped."""


class _Held(NamedTuple):
    """A token whose text is not certain yet."""

    token: int
    logprobs: TokenLogprobs | None
    start: int
    """Characters of the text before it."""


class PieceDecoder:
    """Decodes one choice. Give it each token with ``push``, and take what is certain with ``take``."""

    def __init__(self, codec: Codec, options: TextOptions) -> None:
        self.finish: Finish | None = None
        """Why the choice ended; None until it has."""
        self.pushed = 0
        """Number of tokens that were pushed."""
        self._detokenizer = Detokenizer(codec)
        self._options = options
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._text: list[str] = []
        """Text that was not taken yet."""
        self._decoded = 0
        """Characters that the detokenizer has returned."""
        self._returned = 0
        """Characters that are certain."""
        self._tokens: deque[_Held] = deque()

    def push(self, event: Token) -> None:
        """Add the next token. Tokens after the one with which the choice ends are ignored."""
        if self.finish:
            return
        if self._options.prompt_only:
            self.finish = Finish("length")
            return
        self.pushed += 1
        self._tokens.append(_Held(event.token, event.logprobs, self._decoded))
        # A stop token ends the answer but is not part of its text.
        if event.finish != "stop" or self._options.include_stop:
            self._add(self._detokenizer.push(event.token))
        if event.finish and not self._stops.found:
            self._add(self._detokenizer.flush())
            if not self._stops.found:
                self._keep(self._stops.flush())
        if self._stops.found:
            self.finish = Finish("stop", self._stops.stop)
        elif event.finish:
            stop = event.token if event.finish == "stop" and event.token in self._options.stop_token_ids else None
            self.finish = Finish(event.finish, stop)

    def take(self) -> Piece:
        """Return what is certain now and was not taken yet."""
        text = "".join(self._text)
        self._text.clear()
        taken = self._certain()
        logprobs = [held.logprobs for held in taken if held.logprobs is not None]
        hidden = self._count_hidden(taken) if self.finish else 0
        return Piece(text, [held.token for held in taken], logprobs, hidden, self.finish)

    def _certain(self) -> list[_Held]:
        """Take the tokens whose text, or the beginning of it, is certain."""
        if self._stops.held:
            count = sum(held.start < self._returned for held in self._tokens)
            return [self._tokens.popleft() for _ in range(count)]
        taken = list(self._tokens)
        self._tokens.clear()
        return taken

    def _count_hidden(self, last: list[_Held]) -> int:
        """How many of the last tokens are not in the text."""
        if self._stops.found:
            return sum(held.start >= self._returned for held in last)
        assert self.finish is not None
        return int(self.finish.reason == "stop" and not self._options.include_stop)

    def _add(self, text: str) -> None:
        """Add decoded text, of which stop strings may hold a part back."""
        self._decoded += len(text)
        self._keep(self._stops.push(text) if self.pushed > self._options.min_tokens else text)

    def _keep(self, text: str) -> None:
        if text:
            self._returned += len(text)
            self._text.append(text)
