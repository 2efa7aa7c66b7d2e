"""The nouns of the engine: Sequence, Chunk, Batch and what comes back, Events. No torch here.

A sequence's life:

1. the API makes a :class:`Sequence` (``tokens`` is the prompt) and submits it;
2. the scheduler admits it: slot leases, prefix-cache hits, blocks (``blocks``, ``computed``);
3. each step a :class:`Chunk` of it runs; ``computed`` chases ``len(tokens)``;
4. when they meet, a token is sampled and appended: one :class:`Token` event;
5. it ends by a stop token, by length, by an abort or by an error; every end goes through ``release``.

Everything the API sends or receives (``Sequence`` until it is submitted, ``Event``) is plain data that pickles, so the
engine can move to a process of its own.
"""

import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

from adapters.format.spec import AdapterId

FinishReason = Literal["stop", "length"]
Cause = Literal["adapter", "engine"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens. Values are checked where requests come in."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    """Over prompt and answer (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Over the answer, as OpenAI defines it; so is the next."""
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs."""
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer; the base's end tokens unless the request ignores them."""


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """One adapter in a sequence's adaptation."""

    id: AdapterId
    weight: float
    rank: int
    """Its largest rank: what it takes of the device."""


Adaptation = tuple[WeightedAdapter, ...]
"""What is added to the base: empty for the base itself, one entry for an adapter, several for a mix.
Ids are distinct."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in the engine. Compared by identity."""

    id: str
    tokens: list[int]
    """Prompt, then answer: the engine appends."""
    sampling: SamplingParams
    adaptation: Adaptation = ()
    """In the order of ids, however it was given: a mix is a sum."""
    probe: bool = False
    """Asks for the logits of one token: a short prompt that runs before all that waits, in a step of its own."""
    keep: bool = False
    """Whether a probe's adapter stays on the device like one that was asked for; else it is the first to go."""
    prompt_length: int = field(init=False)
    arrived: float = field(default_factory=time.monotonic)
    """Seconds, monotonic."""
    computed: int = 0
    """Tokens whose keys and values are in ``blocks``. Scheduler."""
    cached: int = 0
    """Prompt tokens taken from the prefix cache at the first admission. Scheduler."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks in order. Scheduler."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix-cache key of each full block so far. BlockPool."""
    leased: bool = False
    """Whether it holds leases on its adapters' slots. Scheduler."""
    preemptions: int = 0
    rng: random.Random = field(init=False)
    """The request's own generator: one draw per sampled token, so batch-mates and preemption do not matter."""

    def __post_init__(self) -> None:
        self.adaptation = tuple(sorted(self.adaptation, key=lambda adapted: adapted.id))
        self.prompt_length = len(self.tokens)
        seed = self.sampling.seed
        self.rng = random.Random(None if seed is None else str(seed))  # of an int it would drop the sign

    @property
    def output_length(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def output(self) -> Seq[int]:
        """The tokens sampled so far."""
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class Chunk:
    """``length`` tokens of a sequence from position ``start``, run in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the step ends with a sampled token for this sequence."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs. Chunks of one token come first: the runner treats those rows together."""

    chunks: tuple[Chunk, ...]
    fresh: tuple[int, ...] = ()
    """KV blocks that changed hands: cleared before anything is written."""

    @property
    def tokens(self) -> int:
        """Rows of the packed forward."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the logits."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]

    @property
    def probe(self) -> bool:
        """Whether this is a probe's step."""
        return bool(self.chunks) and self.chunks[0].sequence.probe


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token. The last one of a sequence carries why it ended."""

    sequence_id: str
    token: int
    finish: FinishReason | None = None
    cached: int = 0
    """Prompt tokens that came from the prefix cache."""
    logits: bytes | None = None
    """Of a probe: what the token was sampled from, [vocabulary] float32 in native byte order."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence ended without an answer. ``message`` is fit for the caller."""

    sequence_id: str
    message: str
    cause: Cause = "engine"
    """Whether its adapter's content is at fault, or anything else."""


Event = Token | Failed
