"""What is asked for: seeded and pure, so that two servers get the same work.

Adapters of a benchmark are called ``bench-000``, ``bench-001``, ... on every server.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

from loadtests.workload import arrivals, mixes
from loadtests.workload.arrivals import Arrivals, Closed
from loadtests.workload.lengths import Lengths
from loadtests.workload.mixes import Mix
from loadtests.workload.trace import Trace

_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea kid body information back
parent face others level office door health person art war history party result change morning reason research girl
guy moment air teacher force education foot boy age policy process music market sense nation plan college interest
death experience effect use class control care field development role effort rate heart drug show leader light voice
wife police mind price report decision son view relationship town road arm difference value building action season
society tax director position player record paper space ground form event official matter center couple site project
"""

WORDS = tuple(_COMMON.split())
"""Common words: with the space before it each is one token to most vocabularies (all are to SmolLM2's)."""

LEAST_REQUESTS = 8
"""Of one round: a lone client sends more than its share, else its figures would rest on two requests."""
OPEN_SECONDS = 20.0
"""How long an open loop sends, unless told how many requests to send."""
OPEN_CLIENTS = 16
"""Which an open loop is warmed up by."""
WARM_UP_TOKENS = 16
"""At most, of an answer before measuring."""
MOST_WARMED = 64
"""Adapters of one workload that are asked for before it begins, unless told otherwise: a server holds only so many."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A beginning that prompts have in common, as system prompts are."""

    scope: Literal["global", "adapter"]
    """Whether all prompts share one, or those of each adapter (the base is one more)."""
    tokens: int
    share: float
    """Of the requests that have it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of traffic."""

    mix: Mix
    arrivals: Arrivals
    prompt: Lengths
    output: Lengths
    prefix: Prefix | None = None
    trace: Trace | None = None
    """Where there is one, lengths come from it, and times and adapters if ``arrivals`` and ``mix`` say so."""
    requests: int | None = None
    """Of one round; None leaves it to :meth:`total`."""
    requests_per_client: int = 2

    @property
    def name(self) -> str:
        """``"zipf:1@64 closed:16"``."""
        return f"{self.mix} {self.arrivals}"

    @property
    def adapters(self) -> int:
        """How many adapters it may ask for."""
        if isinstance(self.mix, mixes.Traced):
            return self.trace.adapters if self.trace else 0
        return self.mix.count

    @property
    def clients(self) -> int:
        """Requests at once in the warm-up, and in a closed loop in all of it."""
        return self.arrivals.clients if isinstance(self.arrivals, Closed) else OPEN_CLIENTS

    @property
    def wanted(self) -> Sequence[int | None]:
        """The adapters it may ask for, by number, the most wanted first; None is the base."""
        if isinstance(self.mix, mixes.Traced):
            assert self.trace is not None
            return list(dict.fromkeys(row.adapter for row in self.trace.rows[: self.total]))
        return self.mix.wanted

    @property
    def total(self) -> int:
        """Requests of a round: as told, all of the trace, a share for each client, or ``OPEN_SECONDS`` of arrivals."""
        if self.requests is not None:
            return self.requests
        if self.trace is not None:
            return len(self.trace.rows)
        if isinstance(self.arrivals, Closed):
            each = max(self.requests_per_client, -(-LEAST_REQUESTS // self.arrivals.clients))
            return each * self.arrivals.clients
        return max(LEAST_REQUESTS, math.ceil(OPEN_SECONDS * self.rate))

    @property
    def rate(self) -> float:
        """Requests asked for per second; NaN in a closed loop."""
        match self.arrivals:
            case Closed():
                return math.nan
            case arrivals.Traced():
                return self.trace.rate if self.trace else math.nan
            case process:
                return process.rate

    def identity(self) -> dict[str, Any]:
        """All that says whether another run had the same work, as JSON."""
        return {
            "adapters": str(self.mix),
            "arrivals": str(self.arrivals),
            "prompt_tokens": "trace" if self.trace else repr(self.prompt),
            "output_tokens": "trace" if self.trace else repr(self.output),
            "prefix": repr(self.prefix) if self.prefix else None,
            "trace": self.trace.digest if self.trace else None,
            "requests": self.total,
        }


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``adapter`` None is the base."""

    prompt: str
    output_tokens: int
    adapter: str | None
    at: float | None = None
    """Seconds after the round's beginning when it is to be sent; None in a closed loop."""


def adapter_name(number: int) -> str:
    """The name of the benchmark's ``number``-th adapter."""
    return f"bench-{number:03d}"


def draw(work: Workload, seed: int, part: str, requests: int | None = None) -> list[Request]:
    """The requests of one round, in order. Another ``part`` of the same ``seed`` has other prompts, lengths and times.

    Shared prefixes are of the seed alone, so that they are the same in every part.
    """
    rng = random.Random(f"{seed}/{part}/{work.name}")
    return _requests(work, rng, seed, _numbers(work, rng, work.total if requests is None else requests))


def draw_warm_up(work: Workload, seed: int, count: int | None = None) -> list[Request]:
    """Short requests that ask for the most wanted adapters in turn, without times.

    The most wanted come last, so that they are what a server with little room still holds. ``count`` None is one for
    each client and each of :data:`MOST_WARMED` adapters at most.
    """
    if count is None:
        count = max(work.clients, min(len(work.wanted), MOST_WARMED))
    numbers = list(islice(cycle(work.wanted[:count]), count))[::-1]
    untimed = replace(work, arrivals=Closed(work.clients))
    drawn = _requests(untimed, random.Random(f"{seed}/warm-up/{work.name}"), seed, numbers)
    return [replace(one, output_tokens=min(one.output_tokens, WARM_UP_TOKENS)) for one in drawn]


def _requests(work: Workload, rng: random.Random, seed: int, numbers: Sequence[int | None]) -> list[Request]:
    """One for each adapter's number."""
    asked = zip(numbers, _lengths(work, rng, len(numbers)), _times(work, rng, len(numbers)), strict=True)
    return [
        Request(_prompt(work.prefix, rng, seed, number, prompt_tokens), output_tokens, _name(number), at)
        for number, (prompt_tokens, output_tokens), at in asked
    ]


def words(rng: random.Random, count: int) -> str:
    """A text of ``count`` random words, about as many tokens; two of them hardly ever begin alike."""
    return " " + " ".join(rng.choices(WORDS, k=count))


def _name(number: int | None) -> str | None:
    return None if number is None else adapter_name(number)


def _numbers(work: Workload, rng: random.Random, count: int) -> Sequence[int | None]:
    if isinstance(work.mix, mixes.Traced):
        assert work.trace is not None
        return [work.trace.rows[index % len(work.trace.rows)].adapter for index in range(count)]
    return work.mix.draw(rng, count)


def _lengths(work: Workload, rng: random.Random, count: int) -> Iterator[tuple[int, int]]:
    for index in range(count):
        if work.trace:
            row = work.trace.rows[index % len(work.trace.rows)]
            yield row.prompt_tokens, row.output_tokens
        else:
            yield work.prompt.draw(rng), work.output.draw(rng)


def _times(work: Workload, rng: random.Random, count: int) -> Sequence[float | None]:
    match work.arrivals:
        case Closed():
            return [None] * count
        case arrivals.Traced():
            assert work.trace is not None
            return [row.at for row in work.trace.rows[:count]]
        case process:
            return process.offsets(rng, count)


def _prompt(prefix: Prefix | None, rng: random.Random, seed: int, number: int | None, tokens: int) -> str:
    """About ``tokens`` tokens, with the shared beginning among them; at least one word is the prompt's own."""
    if prefix is None or rng.random() >= prefix.share:
        return words(rng, tokens)
    shared = min(prefix.tokens, tokens - 1)
    owner = "all" if prefix.scope == "global" else number
    beginning = words(random.Random(f"{seed}/prefix/{owner}"), shared).split()
    return " " + " ".join([*beginning, words(rng, tokens - shared).strip()])
