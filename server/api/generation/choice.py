"""Choice: one sequence of a request, and its answer so far."""

from time import monotonic

from server.api.generation.decoder import PieceDecoder, TextOptions
from server.api.generation.pieces import Finish, Piece
from server.engine.sequence import Event, Failed, PromptLogprobs, Sequence, Timing, Token, TokenLogprobs
from server.metrics.metrics import Metrics
from server.text.codec import Codec


class ChoiceFailed(Exception):
    """The engine has failed the sequence of a choice."""

    def __init__(self, event: Failed) -> None:
        super().__init__(event.message)
        self.event = event


class Choice:
    """One of the answers to a request: takes its events and returns pieces."""

    def __init__(self, sequence: Sequence, codec: Codec, options: TextOptions, metrics: Metrics) -> None:
        self.sequence = sequence
        self.prompt_tokens = sequence.prompt_length
        self.cached_tokens = 0
        """Prompt tokens that were taken from the prefix cache."""
        self.timing: Timing | None = None
        """Where its time went; None until it has ended."""
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.in_engine = False
        """Whether the engine still computes it."""
        self._metrics = metrics
        self._decoder = PieceDecoder(codec, options)
        self.last_token: float | None = None
        """When its last token came, by ``time.monotonic()``."""

    @property
    def prompt(self) -> list[int]:
        """The token ids of the prompt."""
        return self.sequence.tokens[: self.prompt_tokens]

    @property
    def computed_prompt_tokens(self) -> int:
        """Number of the prompt's tokens that were computed or cached: all of them once there is an answer."""
        if self.output_tokens or self.finish or self.prompt_logprobs is not None:
            return self.prompt_tokens
        return min(self.sequence.computed, self.prompt_tokens)

    @property
    def output_tokens(self) -> int:
        """Number of tokens of the answer: with the stop token, without those after a stop string."""
        return self._decoder.pushed

    @property
    def finish(self) -> Finish | None:
        """Why it ended; None until it has."""
        return self._decoder.finish

    def take(self, events: list[Event]) -> Piece:
        """Return what ``events``, the choice's next ones, add to the answer. Raises ChoiceFailed."""
        before = self._decoder.pushed
        for event in events:
            if isinstance(event, Token):
                self._decoder.push(event)
                self.cached_tokens = event.cached
                self.in_engine = event.finish is None
                self.timing = event.timing
                if self.finish and event.timing is None:  # by a stop string, of which the engine knows nothing
                    self.timing = self.sequence.timing(monotonic())
            elif isinstance(event, Failed):
                self.in_engine = False
                if not self.finish:  # else a stop string had ended it before
                    raise ChoiceFailed(event)
            else:
                assert isinstance(event, PromptLogprobs), "the request asks for no other events"
                self.prompt_logprobs = event.logprobs
        if new := self._decoder.pushed - before:
            self._measure(new)
        return self._decoder.take()

    def _measure(self, new: int) -> None:
        """Record the latency of the ``new`` tokens that have just come."""
        now = monotonic()
        if self.last_token is None:
            self._metrics.waited(self.sequence.timing(now), adapted=bool(self.sequence.adaptation))
            gap, new = 0.0, new - 1  # tokens that came together with the first one had no wait of their own
        else:
            gap = now - self.last_token
        if new:
            self._metrics.next_tokens(gap, new)
        self.last_token = now
