"""One streaming request over HTTP -> its Timing."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import httpx

from loadtests.workload import Request

Peer = Literal["manylora", "vllm"]


class RequestFailed(Exception):
    """A request that did not get the whole answer it asked for, with the reason."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When one answer came. Seconds of ``time.perf_counter``."""

    started: float
    arrivals: tuple[float, ...]
    """One for each event that carried text."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens the server says it had in its prompt cache (0 where it does not say)."""
    output_tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between one text and the next."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test: how it addresses adapters and what it calls its base."""

    peer: Peer
    base: str

    def body(self, request: Request) -> dict[str, object]:
        """The JSON body of a streaming ``POST /v1/completions``: greedy, all of its tokens."""
        if self.peer == "vllm":
            names: dict[str, object] = {"model": request.adapter or self.base}
        else:
            names = {"model": self.base, "adapter": request.adapter}
        return names | {
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(slots=True)
class _Answer:
    """What has arrived of one answer."""

    arrivals: list[float] = field(default_factory=list)
    served: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise RequestFailed(f"error in the stream: {event['error']}")
        if any(choice["text"] for choice in event["choices"]):
            self.arrivals.append(time.perf_counter())
        if self.served is None:
            self.served = _served(event)
        self.usage = event.get("usage") or self.usage


async def complete(http: httpx.AsyncClient, target: Target, request: Request) -> Timing:
    """Send one request and read its stream to the end.

    Raises :class:`RequestFailed` for anything but the whole answer: another status than 200, an error in the stream, an
    early end, fewer tokens than asked for, or an answer by another adapter.
    """
    started = time.perf_counter()
    answer = _Answer()
    try:
        async with http.stream("POST", "/v1/completions", json=target.body(request)) as response:
            if response.status_code != httpx.codes.OK:
                body = (await response.aread())[:500].decode(errors="replace")
                raise RequestFailed(f"status {response.status_code}: {body}")
            async for event in _events(response):
                answer.take(event)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from error
    _check(answer, target, request)
    return _timing(started, answer)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    done = False
    # Read past [DONE]: a response left before its end costs its connection.
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    if not done:
        raise RequestFailed("the stream ended without [DONE]")


def _served(event: dict[str, Any]) -> str:
    """Which adapter or base an event says it comes from; manylora lists the adapters, others name them as the model."""
    adapters = event.get("adapter") or []
    return str(adapters[0]["name"] if adapters else event["model"])


def _check(answer: _Answer, target: Target, request: Request) -> None:
    expected = request.adapter or target.base
    if answer.served != expected:
        raise RequestFailed(f"asked for `{expected}`, answered by `{answer.served}`")
    if (tokens := answer.usage.get("completion_tokens")) != request.output_tokens:
        raise RequestFailed(f"asked for {request.output_tokens} tokens, got {tokens}")
    if not answer.arrivals:
        raise RequestFailed("no text in the answer")


def _timing(started: float, answer: _Answer) -> Timing:
    usage = answer.usage
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Timing(started, tuple(answer.arrivals), usage["prompt_tokens"], cached, usage["completion_tokens"])
