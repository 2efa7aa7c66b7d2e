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

from loadtests import error_text
from loadtests.drive.peers import Target
from loadtests.workload.workload import Request

OK = 200


class RequestFailed(Exception):
    """A request did not get the complete answer it asked for. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When the parts of one answer arrived. Times are seconds of ``time.perf_counter``."""

    adapter: str | None
    started: float
    arrivals: tuple[float, ...]
    """When each event with text arrived."""
    ended: float
    """When the answer was complete, ``[DONE]`` included."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens from the server's prefix cache, by its ``usage``; 0 if it does not say."""
    output_tokens: int

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first text (TTFT)."""
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive events with text (ITL in vLLM), however many tokens each has."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end of the answer."""
        return self.ended - self.started

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first text (TPOT), None if all text arrived at once.

        This is (last text - first text) / (tokens - 1), with the tokens of the server's ``usage``, so it does not
        depend on how many tokens each event has.
        """
        streamed = self.arrivals[-1] - self.arrivals[0]
        return streamed / (self.output_tokens - 1) if streamed and self.output_tokens > 1 else None


@dataclass(slots=True)
class _Answer:
    """The events of one answer so far."""

    target: Target
    arrivals: list[float] = field(default_factory=list)
    served: set[str] = field(default_factory=set)
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    def add_event(self, data: bytes, now: float) -> None:
        """Add an event's data, which arrived at ``now``. Raises :class:`RequestFailed` for an error event."""
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(f"error in the stream: {error_text.server_message(json.dumps(event))}")
        if any(self.target.text(choice) for choice in event["choices"]):
            self.arrivals.append(now)
        if (served := self.target.peer.served(event)) is not None:
            self.served.add(served)
        self.usage = event.get("usage") or self.usage


async def complete(http: aiohttp.ClientSession, target: Target, request: Request) -> Timing:
    """Send one request, read its stream to the end and return its timing.

    Raises :class:`RequestFailed` unless the answer is complete and right: status 200, no error event, a final
    ``[DONE]``, as many tokens as asked for, and the adapter that was asked for.
    """
    answer = _Answer(target)
    started = time.perf_counter()
    try:
        async with http.post(target.path, json=target.body(request)) as response:
            if response.status != OK:
                raise RequestFailed(error_text.status_error(response.status, await response.text(errors="replace")))
            async for data, now in _events(response):
                answer.add_event(data, now)
        ended = time.perf_counter()
        _check(answer, request)
        return _timing(request, started, answer, ended)
    except (aiohttp.ClientError, OSError) as error:
        raise RequestFailed(error_text.connection_error(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestFailed("the stream has an event that is not part of a completion") from error


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[bytes, float]]:
    """Yield each event's data and when it arrived. Events read together have the same time."""
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
        raise RequestFailed(f"asked for `{expected}`, but `{wrong.pop()}` answered")
    if (tokens := answer.usage.get("completion_tokens")) != request.output_tokens:
        raise RequestFailed(f"asked for {request.output_tokens} tokens, got {tokens}")
    if type(prompt := answer.usage.get("prompt_tokens")) is not int:
        raise RequestFailed(f"the usage in the answer has prompt_tokens {prompt!r}")
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
