"""PieceDecoder: the tokens of one choice to pieces of text, up to a stop string."""

from bisect import bisect_left
from dataclasses import dataclass

from server.api.generation.pieces import Finish, Piece
from server.engine.sequence import Token, TokenLogprobs
from server.text.codec import Codec
from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What the text of an answer contains, and where it ends."""

    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """The request's own, without the model's end tokens."""
    include_stop: bool = False
    """Whether the stop string or stop token is part of the text."""
    min_tokens: int = 0
    """Tokens whose text is not searched for stop strings."""
    kept: frozenset[int] = frozenset()
    """Special tokens whose text is part of the answer's, for a parser that looks for it."""
    prompt_only: bool = False
    """Whether the answer is empty: the engine samples one token, which is dropped."""


class PieceDecoder:
    """Decodes one choice. Give it each token with ``push``, and take what is certain with ``take``."""

    def __init__(self, codec: Codec, options: TextOptions) -> None:
        self.finish: Finish | None = None
        """Why the choice ended; None until it has."""
        self.pushed = 0
        """Number of tokens that were pushed."""
        self._detokenizer = Detokenizer(codec, options.kept)
        self._options = options
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._text = ""
        """Text that was not taken yet. All below is about tokens that were not taken."""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._starts: list[int] = []
        """With stop strings: for each token, the characters of the text before it."""
        self._decoded = 0
        """Characters that the detokenizer has returned."""
        self._returned = 0
        """Characters that are certain."""

    def push(self, event: Token) -> None:
        """Add the next token. Tokens after the one with which the choice ends are ignored."""
        if self.finish:
            return
        if self._options.prompt_only:
            self.finish = Finish("length")
            return
        self.pushed += 1
        self._tokens.append(event.token)
        if event.logprobs is not None:
            self._logprobs.append(event.logprobs)
        if self._options.stops:
            self._push_before_stop(event)
        else:
            self._text += self._decode(event)
        if event.finish and not self.finish:
            own = event.finish == "stop" and event.token in self._options.stop_token_ids
            self.finish = Finish(event.finish, event.token if own else None)

    def take(self) -> Piece:
        """Return what is certain now and was not taken yet."""
        text, self._text = self._text, ""
        hidden = self._count_hidden() if self.finish else 0
        if self._stops.held:
            # A token comes with the first character of its text.
            count = bisect_left(self._starts, self._returned)
            tokens, self._tokens = self._tokens[:count], self._tokens[count:]
            logprobs, self._logprobs = self._logprobs[:count], self._logprobs[count:]
            self._starts = self._starts[count:]
        else:
            tokens, self._tokens = self._tokens, []
            logprobs, self._logprobs = self._logprobs, []
            self._starts = []
        return Piece(text, tokens, logprobs, hidden, self.finish)

    def _decode(self, event: Token) -> str:
        # A stop token ends the answer but is not part of its text.
        shown = event.finish != "stop" or self._options.include_stop
        text = self._detokenizer.push(event.token) if shown else ""
        return text + self._detokenizer.flush() if event.finish else text

    def _push_before_stop(self, event: Token) -> None:
        """Add the text of a token up to a stop string, of which it may hold a part back."""
        self._starts.append(self._decoded)
        text = self._decode(event)
        self._decoded += len(text)
        if self.pushed > self._options.min_tokens:
            text = self._stops.push(text)
        if self._stops.found:
            self.finish = Finish("stop", self._stops.stop)
        elif event.finish:
            text += self._stops.flush()
        self._returned += len(text)
        self._text += text

    def _count_hidden(self) -> int:
        """How many of the last tokens are not in the text."""
        if self._stops.found:
            return sum(start >= self._returned for start in self._starts)
        assert self.finish is not None
        return int(self.finish.reason == "stop" and not self._options.include_stop)
