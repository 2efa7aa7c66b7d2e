"""Workloads and their requests. Both depend on the seed alone, so that two servers get the same requests.

The adapters of a benchmark are called ``bench-000``, ``bench-001``, ... on every server.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

from loadtests.workload import arrivals, mixes
from loadtests.workload.arrivals import Arrivals, ClosedLoop
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
"""Common words. With the space before it, each is one token in most vocabularies, and in SmolLM2's."""

MIN_REQUESTS = 8
"""Fewest requests of a round by default, so that the metrics of a single client rest on more than two requests."""
OPEN_SECONDS = 20.0
"""How long an open loop sends requests by default."""
OPEN_CLIENTS = 16
"""Concurrent requests in the warm-up of an open loop."""
WARM_UP_TOKENS = 16
"""Most tokens of an answer in the warm-up."""
MAX_WARMED = 64
"""Most adapters of one workload in its warm-up by default: a server keeps a limited number loaded."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix that prompts share, like a system prompt."""

    scope: Literal["global", "adapter"]
    """Whether all prompts share one prefix, or those of each adapter (and of the base) have their own."""
    tokens: int
    share: float
    """Share of the requests that have the prefix."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of traffic: which adapters, when, and how many tokens."""

    mix: Mix
    arrivals: Arrivals
    prompt: Lengths
    output: Lengths
    prefix: Prefix | None = None
    trace: Trace | None = None
    """If given, lengths come from the trace, and so do times and adapters if ``arrivals`` and ``mix`` say so."""
    requests: int | None = None
    """Requests of one round; None for the default of :attr:`total`."""
    requests_per_client: int = 2

    @property
    def name(self) -> str:
        """``"zipf:1@64 closed:16"``."""
        return f"{self.mix} {self.arrivals}"

    @property
    def adapters(self) -> int:
        """How many adapters requests may name."""
        if isinstance(self.mix, mixes.TraceMix):
            return self.trace.adapters if self.trace else 0
        return self.mix.count

    @property
    def clients(self) -> int:
        """Concurrent requests in the warm-up, and in the rounds of a closed loop."""
        return self.arrivals.clients if isinstance(self.arrivals, ClosedLoop) else OPEN_CLIENTS

    @property
    def by_popularity(self) -> Sequence[int | None]:
        """The numbers of the adapters that requests may name, the most popular first; None is the base."""
        if isinstance(self.mix, mixes.TraceMix):
            assert self.trace is not None
            return list(dict.fromkeys(request.adapter for request in self.trace.requests[: self.total]))
        return self.mix.by_popularity

    @property
    def total(self) -> int:
        """Requests of a round: as given, else all of the trace, some per client, or ``OPEN_SECONDS`` of arrivals."""
        if self.requests is not None:
            return self.requests
        if self.trace is not None:
            return len(self.trace.requests)
        if isinstance(self.arrivals, ClosedLoop):
            each = max(self.requests_per_client, -(-MIN_REQUESTS // self.arrivals.clients))
            return each * self.arrivals.clients
        return max(MIN_REQUESTS, math.ceil(OPEN_SECONDS * self.rate))

    @property
    def rate(self) -> float:
        """Requested requests per second; NaN in a closed loop."""
        match self.arrivals:
            case ClosedLoop():
                return math.nan
            case arrivals.TraceArrivals():
                return self.trace.rate if self.trace else math.nan
            case process:
                return process.rate

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for two runs to have had the same workload, as JSON."""
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
    """One request. ``adapter`` None is the base."""

    prompt: str
    output_tokens: int
    adapter: str | None
    at: float | None = None
    """When to send it, in seconds after the start of the round; None in a closed loop."""


def adapter_name(number: int) -> str:
    """Return the name of the benchmark's ``number``-th adapter."""
    return f"bench-{number:03d}"


def draw(work: Workload, seed: int, part: str, requests: int | None = None) -> list[Request]:
    """Return the requests of one round, in order.

    Another ``part`` of the same ``seed`` has other prompts, lengths and times, but the same shared prefixes.
    """
    rng = random.Random(f"{seed}/{part}/{work.name}")
    return _requests(work, rng, seed, _numbers(work, rng, work.total if requests is None else requests))


def draw_warm_up(work: Workload, seed: int, count: int | None = None) -> list[Request]:
    """Return the requests of a warm-up: short ones that name the most popular adapters in turn, without times.

    The most popular come last, so that a server with little room still has them loaded. ``count`` None is one for each
    client and for each of :data:`MAX_WARMED` adapters at most.
    """
    if count is None:
        count = max(work.clients, min(len(work.by_popularity), MAX_WARMED))
    numbers = list(islice(cycle(work.by_popularity[:count]), count))[::-1]
    untimed = replace(work, arrivals=ClosedLoop(work.clients))
    drawn = _requests(untimed, random.Random(f"{seed}/warm-up/{work.name}"), seed, numbers)
    return [replace(one, output_tokens=min(one.output_tokens, WARM_UP_TOKENS)) for one in drawn]


def _requests(work: Workload, rng: random.Random, seed: int, numbers: Sequence[int | None]) -> list[Request]:
    """Return a request for each number of an adapter."""
    asked = zip(numbers, _lengths(work, rng, len(numbers)), _times(work, rng, len(numbers)), strict=True)
    return [
        Request(_prompt(work.prefix, rng, seed, number, prompt_tokens), output_tokens, _name(number), at)
        for number, (prompt_tokens, output_tokens), at in asked
    ]


def words(rng: random.Random, count: int) -> str:
    """Return a text of ``count`` random words, about as many tokens. Two texts hardly ever share a prefix."""
    return " " + " ".join(rng.choices(WORDS, k=count))


def _name(number: int | None) -> str | None:
    return None if number is None else adapter_name(number)


def _numbers(work: Workload, rng: random.Random, count: int) -> Sequence[int | None]:
    if isinstance(work.mix, mixes.TraceMix):
        assert work.trace is not None
        return [work.trace.requests[index % len(work.trace.requests)].adapter for index in range(count)]
    return work.mix.draw(rng, count)


def _lengths(work: Workload, rng: random.Random, count: int) -> Iterator[tuple[int, int]]:
    for index in range(count):
        if work.trace:
            request = work.trace.requests[index % len(work.trace.requests)]
            yield request.prompt_tokens, request.output_tokens
        else:
            yield work.prompt.draw(rng), work.output.draw(rng)


def _times(work: Workload, rng: random.Random, count: int) -> Sequence[float | None]:
    match work.arrivals:
        case ClosedLoop():
            return [None] * count
        case arrivals.TraceArrivals():
            assert work.trace is not None
            return [request.at for request in work.trace.requests[:count]]
        case process:
            return process.offsets(rng, count)


def _prompt(prefix: Prefix | None, rng: random.Random, seed: int, number: int | None, tokens: int) -> str:
    """Return a prompt of about ``tokens`` tokens, its shared prefix included. At least one word is not shared."""
    if prefix is None or rng.random() >= prefix.share:
        return words(rng, tokens)
    shared = min(prefix.tokens, tokens - 1)
    owner = "all" if prefix.scope == "global" else number
    beginning = words(random.Random(f"{seed}/prefix/{owner}"), shared).split()
    return " " + " ".join([*beginning, words(rng, tokens - shared).strip()])
