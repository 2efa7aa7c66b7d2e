"""What the clients ask for: seeded and pure, so that two servers get the same work.

Adapters of a benchmark are called ``bench-000``, ``bench-001``, ... on every server.
"""

import random
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of traffic."""

    name: str
    title: str
    adapters: int
    """How many adapters it spreads over; 0 is the base alone."""
    zipf: bool = False
    """Adapter ``k`` is asked for in proportion to ``1 / (k + 1)``, rather than each in its turn."""


CASES = {
    case.name: case
    for case in (
        Case("base", "base", 0),
        Case("single", "1 adapter", 1),
        Case("distinct", "16 distinct adapters", 16),
        Case("zipf", "64 adapters, Zipf(1)", 64, zipf=True),
    )
}


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the requests are and how many each client sends."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    requests_per_client: int = 2
    requests_at_least: int = 8
    """Of one round in all: a lone client sends more, else its figures would rest on two requests."""

    def turns(self, clients: int) -> int:
        """How many requests each of ``clients`` sends, one after the other."""
        return max(self.requests_per_client, -(-self.requests_at_least // clients))


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole benchmark: every case at every concurrency, ``repeats`` times."""

    cases: tuple[Case, ...]
    concurrency: tuple[int, ...]
    shape: Shape
    repeats: int
    seed: int

    @property
    def adapters(self) -> int:
        """How many adapters it needs."""
        return max(case.adapters for case in self.cases)


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``adapter`` None is the base."""

    prompt: str
    output_tokens: int
    adapter: str | None


def adapter_name(number: int) -> str:
    """The name of the benchmark's ``number``-th adapter."""
    return f"bench-{number:03d}"


def prompt(rng: random.Random, words: int) -> str:
    """A text of ``words`` random words: about as many tokens, and a beginning no other prompt has."""
    return " " + " ".join(rng.choices(WORDS, k=words))


def requests(case: Case, shape: Shape, clients: int, seed: str) -> list[list[Request]]:
    """Each client's requests in order. In ``distinct``, clients up to the number of adapters never share one.

    Another ``seed`` gives other prompts, so a server's prompt cache helps only where a seed is used again.
    """
    rng = random.Random(f"{seed}/{case.name}/{clients}")
    plans: list[list[Request]] = [[] for _ in range(clients)]
    for turn in range(shape.turns(clients)):
        for client, plan in enumerate(plans):
            adapter = _adapter(case, turn * clients + client, rng)
            plan.append(Request(prompt(rng, shape.prompt_tokens), shape.output_tokens, adapter))
    return plans


def _adapter(case: Case, index: int, rng: random.Random) -> str | None:
    if case.adapters == 0:
        return None
    if case.zipf:
        weights = [1 / (rank + 1) for rank in range(case.adapters)]
        return adapter_name(rng.choices(range(case.adapters), weights)[0])
    return adapter_name(index % case.adapters)
