"""The adapters of a soak and the right answers: what each content said to each prompt when it was asked alone."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.drive.streams import Json
from loadtests.errors import ServerUnusable
from loadtests.soak.caller import Caller
from loadtests.workload.adapters import AdapterGenerator

PROMPTS = tuple(
    f"The {word} of"
    for word in ("price", "colour", "length", "weight", "names", "sounds", "moons", "history", "taste", "roots")
)
CLEAR = 0.02
"""Least difference between the log probabilities of the first and the second token. Of a closer pair the second may be
chosen where a backend's answers are equal to rounding only."""
MOST_PROMPTS = 4
"""Prompts that are asked."""

FIXED = "soak/fixed-"
"""Names of adapters that no client changes, by the number of their content."""
CHURNED = ("soak/legal", "soak/german", "soak/team/red", "soak/x")
"""Names whose versions come and go."""
ALIASES = ("soak/prod", "soak/canary")


@dataclass(slots=True)
class World:
    """What clients may ask, and what is right."""

    generator: AdapterGenerator
    contents: int
    answer_tokens: int
    answers: dict[tuple[str, str], str] = field(default_factory=dict)
    """(content id, or "" for the base; prompt) -> text."""
    vectors: dict[str, list[float]] = field(default_factory=dict)
    """Prompt -> embedding by the base."""
    left_out: int = 0
    """Pairs that are not compared, because two tokens were nearly as likely."""
    files: dict[int, list[tuple[str, bytes]]] = field(default_factory=dict)

    def question(self, prompt: str, name: str | None, **fields: Any) -> Json:
        """Return the body of a completion whose answer is compared."""
        body = {"prompt": prompt, "max_tokens": self.answer_tokens, "temperature": 0, "ignore_eos": True, **fields}
        return body if name is None else {**body, "adapter": name}

    def wrong(self, prompt: str, served: Sequence[Json], text: str) -> str | None:
        """Return how an answer differs from the solo run of the content that gave it; None if it is right."""
        content = served[0]["id"] if served else ""
        expected = self.answers.get((content, prompt))
        if expected is None or expected == text:
            return None
        who = served[0]["name"] if served else "the base"
        return f"{who} to {prompt!r}: {text!r}, but alone it said {expected!r}"

    def comparable(self, prompt: str, served: Sequence[Json]) -> bool:
        """Whether there is a solo run to compare with."""
        return (served[0]["id"] if served else "", prompt) in self.answers

    def upload(self, name: str, number: int, **fields: str) -> dict[str, Any]:
        """Return the content of a request that registers content ``number``."""
        return {"data": {"name": name, **fields}, "files": [("files", part) for part in self.files[number]]}

    async def prepare(self, caller: Caller) -> None:
        """Register each content under a fixed name, and ask it alone. Raises ServerUnusable."""
        for number in range(self.contents):
            files = await asyncio.to_thread(self.generator.files, number)
            self.files[number] = list(files.items())
            status, answer = await caller.call(
                "prepare", "POST", "/v1/adapters", (200, 201), **self.upload(f"{FIXED}{number}", number)
            )
            if status not in (200, 201):
                raise ServerUnusable(f"the server refused an adapter of the soak: status {status}, {answer}")
        for prompt in PROMPTS[:MOST_PROMPTS]:
            for name in (None, *(f"{FIXED}{number}" for number in range(self.contents))):
                await self._ask_alone(caller, prompt, name)
            status, answer = await caller.call("prepare", "POST", "/v1/embeddings", json={"input": prompt})
            if status == 200:
                self.vectors[prompt] = answer["data"][0]["embedding"]

    async def _ask_alone(self, caller: Caller, prompt: str, name: str | None) -> None:
        body = self.question(prompt, name, logprobs=2)
        status, answer = await caller.call("prepare", "POST", "/v1/completions", json=body)
        if status != 200:
            raise ServerUnusable(f"the server does not answer the soak's questions: status {status}, {answer}")
        (choice,) = answer["choices"]
        gaps = [best - second for best, second in map(_best_two, choice["logprobs"]["top_logprobs"])]
        if min(gaps) < CLEAR:
            self.left_out += 1
            return
        served = answer["adapter"]
        self.answers[served[0]["id"] if served else "", prompt] = choice["text"]


def _best_two(top: dict[str, float]) -> tuple[float, float]:
    best, second, *_ = [*sorted(top.values(), reverse=True), -math.inf]
    return best, second


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of two vectors."""
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))
