"""Sends one streaming request and times its answer.

This client uses aiohttp although the rest of the product uses httpx2, because a client that needs more CPU takes it
from the server on the same machine: httpx2 needed 2.5 times the CPU time per streamed event (125 us against 50 us,
medians of three runs of 16 concurrent streams of 64 events, on an AMD EPYC with AVX512-BF16 and without AMX).
"""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from loadtests import plain
from loadtests.drive.peers import Target
from loadtests.workload.workload import Request

OK = 200


class RequestFailed(Exception):
    """A request that did not get the whole answer it asked for, with the reason."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When one answer came. Seconds of ``time.perf_counter``."""

    adapter: str | None
    started: float
    arrivals: tuple[float, ...]
    """One for each event that carried text."""
    ended: float
    """When the whole answer was there, ``[DONE]`` included."""
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
        """Seconds between one text and the next, whatever number of tokens each has."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]

    @property
    def whole(self) -> float:
        """Seconds from end to end."""
        return self.ended - self.started

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first text, by the server's own count; None where all text came at once.

        (last text - first text) / (tokens - 1): right however many tokens each event has.
        """
        streamed = self.arrivals[-1] - self.arrivals[0]
        return streamed / (self.output_tokens - 1) if streamed and self.output_tokens > 1 else None


@dataclass(slots=True)
class _Answer:
    """What has arrived of one answer."""

    target: Target
    arrivals: list[float] = field(default_factory=list)
    served: set[str] = field(default_factory=set)
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    def take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(f"error in the stream: {plain.of_answer(json.dumps(event))}")
        if any(self.target.text(choice) for choice in event["choices"]):
            self.arrivals.append(now)
        if (served := self.target.peer.served(event)) is not None:
            self.served.add(served)
        self.usage = event.get("usage") or self.usage


async def complete(http: aiohttp.ClientSession, target: Target, request: Request) -> Timing:
    """Send one request and read its stream to the end.

    Raises :class:`RequestFailed` for anything but the whole answer: another status than 200, an error in the stream, an
    end without ``[DONE]``, another number of tokens than asked for, or an answer by another adapter.
    """
    answer = _Answer(target)
    started = time.perf_counter()
    try:
        async with http.post(target.path, json=target.body(request)) as response:
            if response.status != OK:
                raise RequestFailed(plain.of_status(response.status, await response.text(errors="replace")))
            async for data, now in _events(response):
                answer.take(data, now)
        ended = time.perf_counter()
        _check(answer, request)
        return _timing(request, started, answer, ended)
    except (aiohttp.ClientError, OSError) as error:
        raise RequestFailed(plain.of_connection(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestFailed("the stream has something that is no event of a completion") from error


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[bytes, float]]:
    """The data of each event, and when it arrived; what arrives together has one time."""
    rest = b""
    async for chunk in response.content.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line[6:].rstrip(b"\r"), now


def _check(answer: _Answer, request: Request) -> None:
    if not answer.done:
        raise RequestFailed("the stream ended without [DONE]")
    expected = request.adapter or answer.target.peer.base
    if wrong := answer.served - {expected}:
        raise RequestFailed(f"asked for `{expected}`, answered by `{wrong.pop()}`")
    if (tokens := answer.usage.get("completion_tokens")) != request.output_tokens:
        raise RequestFailed(f"asked for {request.output_tokens} tokens, got {tokens}")
    if type(prompt := answer.usage.get("prompt_tokens")) is not int:
        raise RequestFailed(f"the answer's prompt_tokens is {prompt!r}")
    if not answer.arrivals:
        raise RequestFailed("no text in the answer")


def _timing(request: Request, started: float, answer: _Answer, ended: float) -> Timing:
    usage = answer.usage
    return Timing(
        adapter=request.adapter,
        started=started,
        arrivals=tuple(answer.arrivals),
        ended=ended,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        output_tokens=usage["completion_tokens"],
    )
