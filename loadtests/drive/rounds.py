"""Sends the requests of a round when they are due and collects their timings and failures."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import aiohttp

from loadtests.drive.client import RequestFailed, Timing, complete
from loadtests.drive.peers import Target
from loadtests.workload.workload import Request

Tick = Callable[[], None]
"""Called when a request has ended, with or without an answer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without its complete answer."""

    adapter: str | None
    started: float
    """Seconds of ``time.perf_counter``."""
    ended: float
    reason: str


@dataclass(frozen=True, slots=True)
class Round:
    """The results of one round: one run of one workload."""

    began: float
    """Seconds of ``time.perf_counter``."""
    seconds: float
    cpu_seconds: float
    """CPU time of this client."""
    timings: tuple[Timing, ...]
    failures: tuple[Failure, ...] = ()
    late: tuple[float, ...] = ()
    """Open loop: how many seconds after its due time each request was sent."""
    in_flight: int = 0
    """The most requests in flight at once."""

    @property
    def requests(self) -> int:
        return len(self.timings) + len(self.failures)


@dataclass(slots=True)
class _Sender:
    """Sends requests and collects their results."""

    http: aiohttp.ClientSession
    target: Target
    tick: Tick
    timings: list[Timing] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0

    async def send(self, request: Request) -> None:
        started = time.perf_counter()
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            self.timings.append(await complete(self.http, self.target, request))
        except RequestFailed as failure:
            self.failures.append(Failure(request.adapter, started, time.perf_counter(), str(failure)))
        finally:
            self.in_flight -= 1
        self.tick()

    async def send_in_turn(self, requests: Iterable[Request]) -> None:
        for request in requests:
            await self.send(request)

    async def send_when_due(self, requests: Sequence[Request], began: float) -> None:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                assert request.at is not None
                due = began + request.at
                await asyncio.sleep(due - time.perf_counter())
                self.late.append(max(time.perf_counter() - due, 0.0))
                group.create_task(self.send(request))


async def run_closed(
    http: aiohttp.ClientSession, target: Target, requests: Sequence[Request], clients: int, tick: Tick
) -> Round:
    """Run a closed loop: each of ``clients`` sends the next request as soon as its last one has ended."""
    sender = _Sender(http, target, tick)
    began, cpu = time.perf_counter(), time.process_time()
    queue = iter(requests)
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(sender.send_in_turn(queue))
    return _round(sender, began, cpu)


async def run_open(http: aiohttp.ClientSession, target: Target, requests: Sequence[Request], tick: Tick) -> Round:
    """Run an open loop: each request is sent at its time, whether the others have ended or not."""
    sender = _Sender(http, target, tick)
    began, cpu = time.perf_counter(), time.process_time()
    await sender.send_when_due(requests, began)
    return _round(sender, began, cpu)


def _round(sender: _Sender, began: float, cpu: float) -> Round:
    return Round(
        began=began,
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu,
        timings=tuple(sender.timings),
        failures=tuple(sender.failures),
        late=tuple(sender.late),
        in_flight=sender.most,
    )
