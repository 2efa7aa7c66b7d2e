"""Runs a benchmark of one server: registers adapters, runs every workload, removes the adapters."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from yarl import URL

from bases.interrupts import sigterm_raises
from loadtests import cancellation, error_text
from loadtests.drive.peers import PeerName, Target
from loadtests.drive.progress import Display
from loadtests.drive.registration import AdapterRegistrar, AdapterSetup, find_peer, registered_adapters
from loadtests.drive.rounds import Round, run_closed, run_open
from loadtests.drive.server_process import spawned
from loadtests.errors import ServerUnusable
from loadtests.machine import client_machine, client_version
from loadtests.report.metrics import round_metrics, workload_metrics
from loadtests.report.record import Record, WorkloadResult, make_record
from loadtests.report.table import number
from loadtests.report.thresholds import check_thresholds
from loadtests.settings import BenchSettings
from loadtests.workload.arrivals import ClosedLoop
from loadtests.workload.workload import Request, Workload, draw, draw_warm_up

CONNECT_SECONDS = 10.0
CLOCK = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark of one server, ready to run."""

    settings: BenchSettings
    workloads: Sequence[Workload]
    display: Display

    def run(self) -> Record:
        """Run every workload and return the record.

        Raises :class:`~loadtests.errors.BenchError`, and KeyboardInterrupt for Ctrl-C, SIGTERM and SIGHUP. Adapters
        that were registered are removed in any case; those that could not be removed are named on stderr.
        """
        thresholds = self.settings.thresholds(self.workloads)
        settings = self.settings
        settings.adapter_setup(settings.adapter_folder)  # raises BadOption before a server is started
        started = time.strftime(CLOCK, time.gmtime())
        with ExitStack() as stack:
            stack.enter_context(sigterm_raises())
            url, folder = settings.address, settings.adapter_folder
            if settings.spawn:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="loadtests-")))
                url = URL(stack.enter_context(spawned(settings.spawn, folder)).url)
            server, results = cancellation.run_cancellable(self._measure(url, settings.adapter_setup(folder)))
        about = {
            "version": client_version(),
            "started": started,
            "finished": time.strftime(CLOCK, time.gmtime()),
            "machine": client_machine(),
            "server": server,
            "settings": settings.model_dump(mode="json", exclude={"url", "api_key"}),
        }
        checked = check_thresholds(thresholds, [(result.work, result.metrics) for result in results])
        return make_record(results, checked, self._conditions(), about)

    def _conditions(self) -> dict[str, Any]:
        """Return the options that must be equal in runs that are compared."""
        chosen = ("endpoint", "seed", "repeats", "warm_up", "ranks", "targets", "adapter_seed")
        return self.settings.model_dump(mode="json", include=set(chosen))

    async def _measure(self, url: URL, setup: AdapterSetup) -> tuple[dict[str, Any], list[WorkloadResult]]:
        settings, shown = self.settings, str(url).rstrip("/")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=settings.timeout)
        # No limit of connections: requests that wait in the client would count as the server's queue.
        # llama.cpp closes connections that are used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=settings.peer == "llamacpp")
        try:
            async with aiohttp.ClientSession(
                url, headers=settings.headers, timeout=timeout, connector=connector
            ) as http:
                peer, has = await find_peer(http, settings.peer, settings.base)
                server = {
                    "peer": settings.peer,
                    "url": shown,
                    "base": peer.base,
                    "version": await _version(http, settings.peer),
                }
                self.display.say(f"{shown} serves `{peer.base}`")
                target = Target(peer, settings.endpoint)
                count = max(work.adapters for work in self.workloads)
                async with registered_adapters(
                    AdapterRegistrar(http, settings.peer, setup), has, count, self.display
                ) as left:
                    results = [await self._work(http, target, work) for work in self.workloads]
                return {**server, "left_behind": left}, results
        except (aiohttp.ClientError, OSError) as error:
            raise ServerUnusable(f"{shown}: {error_text.connection_error(error)}; {_advice(error)}") from error

    async def _work(self, http: aiohttp.ClientSession, target: Target, work: Workload) -> WorkloadResult:
        seed, repeats = self.settings.seed, self.settings.repeats
        brief = [] if self.settings.warm_up == 0 else draw_warm_up(work, seed, self.settings.warm_up)
        warm_up = await self._warm_up(http, target, work, brief) if brief else None
        rounds = []
        for repeat in range(repeats):
            title = f"{work.name}, round {repeat + 1} of {repeats}"
            run = await self._round(http, target, work, draw(work, seed, str(repeat)), title)
            rounds.append(run)
            self.display.say(f"{title}: {_summary(run)}")
        warmed = len({request.adapter for request in brief} - {None})
        return WorkloadResult(work, rounds, workload_metrics(work.name, rounds, work.rate, warm_up), warmed)

    async def _warm_up(
        self, http: aiohttp.ClientSession, target: Target, work: Workload, requests: Sequence[Request]
    ) -> Round:
        title = f"{work.name}, warm-up"
        with self.display.counting(title, len(requests)) as tick:
            warm_up = await run_closed(http, target, requests, work.clients, tick)
        if warm_up.failures:
            self.display.say(f"{title}: {len(warm_up.failures)} FAILED")
        return warm_up

    async def _round(
        self, http: aiohttp.ClientSession, target: Target, work: Workload, requests: Sequence[Request], title: str
    ) -> Round:
        with self.display.counting(title, len(requests)) as tick:
            if isinstance(work.arrivals, ClosedLoop):
                return await run_closed(http, target, requests, work.arrivals.clients, tick)
            return await run_open(http, target, requests, tick)


async def _version(http: aiohttp.ClientSession, peer: PeerName) -> str | None:
    """Return the server's version; None if it does not say."""
    path, field = ("props", "build_info") if peer == "llamacpp" else ("version", "version")
    async with http.get(path) as response:
        if not response.ok:
            return None
        try:
            answer = await response.json(content_type=None)
        except (ValueError, RecursionError):
            return None
    return str(answer[field]) if isinstance(answer, dict) and field in answer else None


def _advice(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientSSLError):
        return "begin --url with http://, or give the host name of the certificate"
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientResponseError | aiohttp.InvalidURL):
        return "start the server, or give its address with --url"
    if isinstance(error, TimeoutError):
        return "check that the server is not stuck; --timeout sets a longer limit"
    return "see the log of the server"


def _summary(run: Round) -> str:
    values = round_metrics(run, float("nan"))
    failed = f"; {len(run.failures)} FAILED" if run.failures else ""
    first, token = (
        " / ".join(number(values[f"{name}_p{percent}_ms"]) for percent in (50, 95)) for name in ("ttft", "tpot")
    )
    return f"{number(values['output_tokens_per_s'])} tok/s, first text {first} ms, per token {token} ms{failed}"
