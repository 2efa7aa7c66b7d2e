"""The engine's data types: Sequence, Chunk, Batch and Event. No torch here.

A sequence's life:

1. the API makes a :class:`Sequence`, whose ``tokens`` are the prompt, and submits it;
2. the scheduler admits it: it leases slots, takes prefix-cache hits, and allocates ``blocks``;
3. each step runs a :class:`Chunk` of it and advances ``computed``;
4. when ``computed`` reaches the end of the prompt, its :class:`PromptLogprobs` or its :class:`Pooled` vector are
   events, if it asks for one of them; a pooled sequence ends here, and so does one with ``max_tokens`` 0;
5. when ``computed`` reaches ``len(tokens)``, a token is sampled and appended, and one more for each draft that is
   accepted: each is a :class:`Token` event;
6. it ends by a stop token, by length, by an abort or by an error, always through ``Scheduler.release``.

What the API sends and receives (``Sequence`` before it is submitted, ``Event``) can be pickled, but for a grammar, so
that the engine can move to a process of its own.
"""

import random
import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from adapters.format.spec import AdapterId
from server.engine.grammar import Grammar, GrammarFailure, Matcher

FinishReason = Literal["stop", "length"]
Cause = Literal["adapter", "grammar", "request", "memory", "deadline", "engine"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request. The API has validated them."""

    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    """For tokens of prompt and answer (Keskar et al. 2019). 1 means none."""
    presence_penalty: float = 0.0
    """For tokens of the answer, as OpenAI defines it; likewise ``frequency_penalty``."""
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs."""
    max_tokens: int = 16
    """0, only with ``Sequence.prompt_logprobs``: the sequence ends after its prompt."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer: the base's end tokens, or none if the request has ``ignore_eos``."""
    min_tokens: int = 0
    """Tokens of the answer before which no stop token is sampled: until then, their logits are -inf."""
    logprobs: int | None = None
    """With each token, return its log probability and those of this many most likely tokens; None returns none."""
    speculation: bool = True
    """Whether tokens may be drafted for it, where the server does that. The answer is the same either way."""


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter of a sequence, with its weight."""

    id: AdapterId
    weight: float
    rank: int
    """The largest rank of its layers: its rank columns on the device."""


Pooling = Literal["last", "mean"]
"""How the final hidden states of a prompt become one vector: the last token's, or the mean over all tokens."""

Adaptation = tuple[WeightedAdapter, ...]
"""The adapters of a sequence: none for the base itself, one, or several for a mix. Ids are distinct."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in the engine. Compared by identity."""

    id: str
    tokens: list[int]
    """Prompt and answer: the engine appends sampled tokens."""
    sampling: SamplingParams
    adaptation: Adaptation = ()
    """Sorted by id, for the order of a mix does not matter."""
    probe: bool = False
    """Whether this is a probe: it runs before all waiting sequences, in a step of its own, and returns logits."""
    keep: bool = False
    """Whether a probe counts as use of its adapter. If not, the adapter is evicted before all others."""
    prompt_logprobs: int | None = None
    """Return the log probabilities of the prompt's tokens, as ``SamplingParams.logprobs`` does for the answer's."""
    grammar: Grammar | None = None
    """What the answer must look like. It ends where the grammar does, with a stop token."""
    matcher: Matcher | None = field(init=False, default=None)
    """Where in the grammar the answer is."""
    pooling: Pooling | None = None
    """Return one vector for the prompt instead of an answer: all of ``sampling`` is ignored."""
    tenant: str = ""
    """Whose request it is: the id of an API key. Tenants share the server's time, but no keys and values."""
    weight: float = 1.0
    """The tenant's share of the time, against the weights of other tenants."""
    priority: int = 0
    """Lower is earlier, among the sequences of a tenant: a point is worth a second of waiting."""
    deadline: float | None = None
    """When the answer must be complete, by ``time.monotonic()``. Afterwards nothing more is computed for it."""
    prompt_length: int = field(init=False)
    arrived: float = field(default_factory=time.monotonic)
    """``time.monotonic()``, in seconds."""
    charged: int = 0
    """Tokens of the prompt that its tenant was charged for, or that were free. Set by Scheduler."""
    computed: int = 0
    """Tokens whose keys and values are in ``blocks``. Set by Scheduler."""
    cached: int = 0
    """Prompt tokens taken from the prefix cache when it was first admitted. Set by Scheduler."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks, in order. Set by Scheduler."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of the full blocks. Set by ``block_pool.chain_keys``."""
    leased: bool = False
    """Whether it holds leases on its adapters' slots. Set by Scheduler."""
    preemptions: int = 0
    read: int = 0
    """Tokens of the prompt whose outputs were read, for ``prompt_logprobs`` or ``pooling``. Set by Scheduler."""
    scores: "list[TokenLogprobs] | None" = field(init=False)
    """Those of the prompt so far, from its second token; None if none are to be delivered. Set by Scheduler."""
    hidden: bytes | None = None
    """The sum of the hidden states read so far, [hidden size] float64. Set by Scheduler."""
    started: float | None = None
    """When its first step began, by ``time.monotonic()``. Set by Scheduler, like what follows."""
    loading: float = 0.0
    """Seconds from its arrival until its adapters were on the device."""
    first_token: float | None = None
    batch_adapters: int = 0
    """Most distinct adapters, the base included, in a step of it."""
    fingerprint: bytes | None = None
    """Equal for sequences that ask for the same. Set by ``resilience.suspects`` once a step has failed."""
    rng: random.Random = field(init=False)
    """The request's own generator, for one number per token: batch and preemption do not change its draws."""
    _numbers: deque[float] = field(init=False, default_factory=deque)
    """Those for the next tokens that were taken already, for rows after drafts."""

    def __post_init__(self) -> None:
        self.adaptation = tuple(sorted(self.adaptation, key=lambda adapter: adapter.id))
        self.prompt_length = len(self.tokens)
        self.matcher = self.grammar.start() if self.grammar else None
        self.scores = None if self.prompt_logprobs is None else []
        seed = self.sampling.seed
        self.rng = random.Random(None if seed is None else str(seed))  # a str, for Random drops an int's sign

    def append(self, token: int) -> None:
        """Append a sampled token."""
        self.tokens.append(token)
        if self._numbers:
            self._numbers.popleft()

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) by which to draw the next token of the answer, or the one ``ahead`` tokens after it."""
        while len(self._numbers) <= ahead:
            self._numbers.append(self.rng.random())
        return self._numbers[ahead]

    @property
    def due(self) -> float:
        """When it would have arrived, had it waited for the seconds that its priority is worth."""
        return self.arrived + self.priority

    @property
    def samples(self) -> bool:
        """Whether it has an answer."""
        return self.pooling is None and self.sampling.max_tokens > 0

    @property
    def unread(self) -> range:
        """Positions in the prompt whose outputs are to be read: logits for log probabilities, or hidden states.

        Each must be computed; a prefix-cache hit would give its keys and values only.
        """
        if self.pooling is None:
            return range(self.read, 0 if self.prompt_logprobs is None else self.prompt_length - 1)
        return range(self.prompt_length - 1 if self.pooling == "last" else self.read, self.prompt_length)

    def timing(self, now: float) -> "Timing":
        """Where its time went, if it ends ``now``, by ``time.monotonic()``."""
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        return Timing(
            queue=max(started - self.arrived - self.loading, 0.0),
            load=self.loading,
            prefill=first - started,
            decode=now - first,
            cold=self.loading > 0,
            batch_adapters=self.batch_adapters,
            preemptions=self.preemptions,
        )

    @property
    def output_length(self) -> int:
        """Number of tokens sampled so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def output(self) -> Seq[int]:
        """The tokens sampled so far."""
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class Chunk:
    """``length`` tokens of a sequence, from position ``start``, that run in one step."""

    sequence: Sequence
    start: int
    length: int
    drafts: tuple[int, ...] = ()
    """Tokens drafted after the sequence's last one: the last rows of the chunk, included in ``length``."""

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the step samples a token for this sequence, and one after each draft."""
        return self.end == len(self.sequence.tokens) + len(self.drafts) and self.sequence.samples

    @property
    def sampled(self) -> list["SampledRow"]:
        """The rows from whose logits a token is sampled: the last token's, and each draft's."""
        ahead = range(len(self.drafts) + 1 if self.samples else 0)
        return [SampledRow(self.sequence, self.drafts[:count]) for count in ahead]

    @property
    def read(self) -> range:
        """Positions whose outputs are read for the prompt's log probabilities or its vector."""
        unread = self.sequence.unread
        return range(max(self.start, unread.start), min(self.end, unread.stop))


class SampledRow(NamedTuple):
    """A row of the logits, from which a token of ``sequence`` is sampled."""

    sequence: Sequence
    drafts: tuple[int, ...] = ()
    """Tokens between the sequence's last one and the sampled one."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The chunks that one step runs. Those of one token come first: backends compute their rows together."""

    chunks: tuple[Chunk, ...]
    new_blocks: tuple[int, ...] = ()
    """KV blocks allocated since the last step. The runner clears them before it writes."""

    @property
    def tokens(self) -> int:
        """Number of tokens, the rows of the forward pass."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def sampled(self) -> list[SampledRow]:
        """The first rows of the logits."""
        return [row for chunk in self.chunks for row in chunk.sampled]

    @property
    def scored(self) -> list[Chunk]:
        """Those whose ``read`` positions are the other rows of the logits, for the prompt's log probabilities."""
        return [chunk for chunk in self.chunks if chunk.sequence.pooling is None and chunk.read]

    @property
    def pooled(self) -> list[Chunk]:
        """Those whose ``read`` positions are the rows of the hidden states."""
        return [chunk for chunk in self.chunks if chunk.sequence.pooling is not None and chunk.read]

    @property
    def adapters(self) -> int:
        """Number of distinct adapters, the base included."""
        used = {adapter.id for chunk in self.chunks for adapter in chunk.sequence.adaptation}
        return len(used) + any(not chunk.sequence.adaptation for chunk in self.chunks)

    @property
    def probe(self) -> bool:
        """Whether this batch is one probe."""
        return bool(self.chunks) and self.chunks[0].sequence.probe


class TokenLogprobs(NamedTuple):
    """The log probability of a token, and of the most likely tokens in its place, natural and in float32.

    By the model's own logits: before penalties, bias, temperature, filters and masks, as vLLM's ``raw_logprobs``.
    """

    logprob: float
    rank: int
    """1 if no token is more likely."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), most likely first; of equally likely ones the smaller id first."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner makes of a batch."""

    tokens: Seq[int | None]
    """A token id for each of ``Batch.sampled``; None if its logits were not finite."""
    logprobs: Seq[TokenLogprobs | None] = ()
    """Of those tokens, None where the sequence asks for none; empty if no sequence does."""
    scores: Seq[Seq[TokenLogprobs] | None] = ()
    """For each of ``Batch.scored``, those of the tokens after its ``read`` positions; None if one is not finite."""
    pooled: Seq[bytes | None] = ()
    """For each of ``Batch.pooled``: its vector if it ends the prompt, else the sum so far; None if it is not finite."""
    logits: bytes | None = None
    """Only of a probe: [vocabulary] float32 in native byte order."""
    forwarded: float = field(default=0.0, compare=False)
    """When the forward pass had returned, by ``time.perf_counter()``. On a GPU it may still compute then."""
    unmasked: Mapping[int, GrammarFailure] = field(default_factory=dict)
    """Index in ``tokens`` of the first of a sequence that its grammar has no mask for, and why: it must not be used."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a sequence went, in seconds."""

    queue: float
    """Waiting for its turn, without ``load``."""
    load: float
    """Waiting for its adapters, 0 if they were on the device."""
    prefill: float
    """From its first step to its first token."""
    decode: float
    """From its first token to its last."""
    cold: bool
    """Whether an adapter had to be loaded."""
    batch_adapters: int
    """Most distinct adapters, the base included, in a step that it took part in."""
    preemptions: int


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token."""

    sequence_id: str
    token: int
    finish: FinishReason | None = None
    """Why the sequence ended, in its last token."""
    cached: int = 0
    """Prompt tokens taken from the prefix cache."""
    logits: bytes | None = None
    """Only of a probe: the logits of the token, [vocabulary] float32 in native byte order."""
    logprobs: TokenLogprobs | None = None
    """If ``SamplingParams.logprobs`` asks for them."""
    timing: Timing | None = field(default=None, compare=False)
    """Only in the last token."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of a prompt's tokens, before its first sampled token. The only event if ``max_tokens`` is 0."""

    sequence_id: str
    logprobs: tuple[TokenLogprobs | None, ...]
    """One for each token of the prompt; None for the first, which nothing precedes."""
    finish: FinishReason | None = None
    """``length`` if ``max_tokens`` is 0: then no other event follows."""
    cached: int = 0
    """Prompt tokens taken from the prefix cache: 0, for all logits are needed."""
    timing: Timing | None = field(default=None, compare=False)
    """Only if no other event follows."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """The vector of a sequence with ``pooling``. It is the only event of the sequence."""

    sequence_id: str
    vector: bytes
    """[hidden size] float32 in native byte order, not normalised: hidden states after the model's last norm."""
    cached: int = 0
    """Prompt tokens taken from the prefix cache: 0 for ``mean``, which needs the hidden states of all."""
    timing: Timing | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence has failed. ``message`` may be shown to the client."""

    sequence_id: str
    message: str
    cause: Cause = "engine"
    """What is at fault. ``adapter``: the content of one; ``grammar``: it takes too much to follow; ``request``: steps
    fail with this sequence, and not without it; ``memory``: there is too little; ``deadline``: the sequence's own
    cannot be met; ``engine``: any other cause."""


Event = Token | PromptLogprobs | Pooled | Failed


def is_last(event: Event) -> bool:
    """Whether no other event of its sequence follows."""
    return isinstance(event, Failed | Pooled) or event.finish is not None
