"""``manylora serve``: load the base, listen, serve requests, drain."""

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
from functools import partial
from math import ceil
from time import monotonic
from types import FrameType

import torch
import uvicorn

import bases.nf4  # noqa: F401 - before transformers, for the reason it gives
from bases import machine
from bases.base import load_base
from bases.errors import ConfigError
from bases.interrupts import exit_at_once
from server.access.key_file import VARIABLE
from server.access.keyring import Keyring
from server.api.app import create_app
from server.api.protocol.client import ClientProtocol, ClientTimeouts
from server.api.service import Service
from server.api.startup import open_resources, open_service
from server.api.telemetry.refusals import Refusals
from server.compute.cpu.memory import trim_memory
from server.config import Settings
from server.connections import Connections, connection_limits
from server.environment import service_links
from server.garbage import keep_start_from_collector
from server.listener import NO_KEYS, Listener, bind, is_local
from server.logs import set_up_logs
from server.metrics.connections import ConnectionCollector
from server.tls import load_certificate
from server.watchdog import EXIT_STATUS

log = logging.getLogger(__name__)

LOGS_PROMPTS = (
    "--log-prompts: EVERY PROMPT AND EVERY ANSWER IS WRITTEN TO THE LOG, with all that users confide in them. "
    "Whoever can read the log can read them."
)
CLOSE_SECONDS = 5
"""Seconds for connections to close after the drain time, or after the last request if that ends later."""
CLOSE = (b"connection", b"close")
CERTIFICATE_TICKS = 100
"""Tenths of a second between two looks at the files of the TLS certificate."""
TRIM_TICKS = 600
"""Tenths of a second after which freed memory that glibc keeps is returned to the system again. The start and uploads
leave holes of some hundred MiB in the heap: without this, allocations fill them with pages for hours, and all stay. It
takes 4 ms for 20 MiB, on a thread."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish open requests. Raises ConfigError or BaseRejected before listening."""
    set_up_logs(settings.log_level, settings.log_format)
    log_environment()
    if settings.log_prompts:
        log.warning(LOGS_PROMPTS)
    torch.set_num_threads(1)  # on this thread, for the reason Engine.start gives
    machine.allow_more_files()
    connection_limits(settings)
    load_certificate(settings)
    # Opened first: errors show at once and not after minutes of loading the base.
    with bind(settings.host, settings.port) as listener, open_resources(settings) as opened:
        require_keys(settings, listener, opened.keyring)
        base = load_base(settings.base, print_line)
        service = open_service(base, settings, print_line, opened)
        server = DrainingServer(service)
        keep_start_from_collector()
        trim_memory()
        server.run(sockets=[listener])
        if service.engine.hangs:
            os._exit(EXIT_STATUS)  # a thread in a native call would keep the process from ending


def log_environment() -> None:
    """Log environment variables that users may expect to have an effect but have none."""
    if links := service_links():
        log.info(
            "Ignoring these environment variables, which are Kubernetes service links and not options: %s",
            ", ".join(links),
        )
    if os.environ.get("MANYLORA_API_KEY"):
        log.warning(
            "MANYLORA_API_KEY is set, which is the key that `manylora adapters`, `train` and `bench` send. Keys that "
            "this server accepts are given in %s, in --api-key-file, or made with `manylora keys add`.",
            VARIABLE,
        )


def require_keys(settings: Settings, listener: socket.socket, keyring: Keyring) -> None:
    """Raise ConfigError if other machines reach the address, there are no keys, and nobody has said that this is meant.

    An address of this machine may be served without keys; so may one behind a proxy that checks them.
    """
    if keyring.required or is_local(listener):
        return
    if not settings.allow_anonymous:
        raise ConfigError(NO_KEYS.format(host=settings.host))
    log.warning("There are no API keys: everybody who reaches %s may use and change this server.", settings.host)


def print_line(line: str) -> None:
    """Print a line to stdout, unbuffered."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def startup_message(service: Service, listener: socket.socket) -> str:
    """Return the last lines printed at startup: the address, and an example request to copy."""
    scheme = "http" if service.settings.tls_cert is None else "https"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    body: dict[str, object] = {"model": service.base.name, "temperature": 0, "max_tokens": 64}
    if service.codec.template is not None:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path, body["prompt"] = "completions", "The capital of France is"
    curl = f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"serving {service.base.name} on {url}; try\n{curl}"


class DrainingServer(uvicorn.Server):
    """A uvicorn server that, after the first signal, finishes open requests, uploads and registrations before it exits.

    First it is not ready, but still takes requests for ``drain_delay_seconds``: load balancers see only at their next
    look that they should send no more. Then new requests get 503. A second signal ends the process immediately.
    """

    def __init__(self, service: Service) -> None:
        """Raises ConfigError if the TLS certificate cannot be used, or too few files may be open."""
        settings = service.settings
        self.connections = Connections(connection_limits(settings))
        service.metrics.add(ConnectionCollector(self.connections))
        self._certificate = certificate = load_certificate(settings)
        timeouts = ClientTimeouts(settings.request_timeout_seconds, settings.write_timeout_seconds)
        refusals = Refusals(service.metrics)
        super().__init__(
            uvicorn.Config(
                create_app(service),
                # Python's own loop and h11: they let listener.py count connections and request_head.py check heads.
                # httptools has no limit for a head, and took one of 64 MiB.
                loop="asyncio",
                http=partial(  # type: ignore[arg-type]
                    ClientProtocol, connections=self.connections, timeouts=timeouts, refusals=refusals
                ),
                ws="none",
                log_config=None,
                log_level=logging.DEBUG if settings.log_level == "debug" else logging.WARNING,
                access_log=False,  # middleware.py writes the access log
                proxy_headers=bool(settings.forwarded_allow_ips),  # uvicorn itself would trust this machine
                forwarded_allow_ips=list(settings.forwarded_allow_ips),
                headers=[("x-content-type-options", "nosniff")],
                server_header=False,
                timeout_keep_alive=settings.keep_alive_seconds,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
            )
        )
        self._service = service
        self._chores: asyncio.Task[None] | None = None
        self._drain_at: float | None = None
        """When to take no more requests, by ``time.monotonic()``; None: at no time that is known yet, or already."""
        self._deadline: float | None = None
        self._hint = ""
        """Added to the lines that say what the server waits for."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and print the startup message."""
        # Connections inherit this option, so that the next server can bind while old connections still close.
        for listener in sockets or ():
            assert isinstance(listener, Listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.connections = self.connections
        await super().startup(sockets)
        if self.started and sockets:
            print_line(startup_message(self._service, sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle the first signal: leave. The next signal ends the process immediately."""
        signal.signal(signal.SIGINT, exit_at_once)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._hint = "; press Ctrl-C again to stop now" if sig == signal.SIGINT else ""
        self.leave()
        # Do not print in a signal handler: the interrupted code may be printing, too.
        asyncio.get_running_loop().call_soon_threadsafe(self._report_progress)

    def _report_progress(self) -> None:
        """Print what the server is waiting for."""
        if self._service.in_progress:
            print_line(f"finishing {_in_progress(self._service)}{self._hint}")

    def _report_unread(self) -> None:
        """Print that the server waits for clients to read: nothing else is in progress."""
        count = sum(connection.is_sending for connection in self._client_connections())
        if count:
            print_line(f"sending {_count(count, 'answer')} that clients have yet to read{self._hint}")

    def leave(self) -> None:
        """Be no longer ready; drain after ``drain_delay_seconds``, in which requests are still taken."""
        self._announce()
        if delay := self._service.settings.drain_delay_seconds:
            self._drain_at = monotonic() + delay
        else:
            self.drain()

    def drain(self) -> None:
        """Accept no new requests; exit when nothing is in progress, or after ``drain_seconds``."""
        self._announce()
        self._drain_at = None
        self._service.event_router.draining = True
        self._deadline = monotonic() + self._service.settings.drain_seconds

    def _announce(self) -> None:
        """Tell clients and load balancers to go elsewhere: by ``/readyz``, and with the next response."""
        if not self._service.leaving.is_set():
            self._service.leaving.set()
            self.config.encoded_headers.append(CLOSE)
            # uvicorn copies them once a second; what begins to be answered before that says it, too.
            self.server_state.default_headers.append(CLOSE)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: return whether to exit."""
        if counter % 10 == 0:
            self._end_slow_clients()
        if counter % CERTIFICATE_TICKS == 0 and (self._chores is None or self._chores.done()):
            # Not awaited: other work may keep all threads busy, and the end of the drain must not wait for them.
            self._chores = asyncio.create_task(self._do_chores(trim=counter % TRIM_TICKS == 0))
        if self._drain_at is not None and monotonic() >= self._drain_at:
            self.drain()
        if self._deadline is not None:
            late = monotonic() > self._deadline
            if late and self._service.in_progress:
                log.warning(
                    "Still in progress at the end of the drain time, and aborted: %s", _in_progress(self._service)
                )
                # Their clients receive an error, at once: the engine stops only after a step, which may take long.
                self._service.event_router.fail_all("The server is shutting down.")
                await asyncio.to_thread(self._service.engine.stop)
            self.should_exit = late or not self._service.in_progress
            if self.should_exit and not late:
                self._report_unread()
            # What was answered in time is also sent in time, however slowly it is read.
            self.config.timeout_graceful_shutdown = max(CLOSE_SECONDS, ceil(self._deadline - monotonic()))
        return await super().on_tick(counter)

    async def _do_chores(self, *, trim: bool) -> None:
        if self._certificate is not None:
            await asyncio.to_thread(self._certificate.refresh)
        if trim:
            await asyncio.to_thread(trim_memory)

    def _end_slow_clients(self) -> None:
        now = monotonic()
        for connection in self._client_connections():
            connection.check(now)

    def _client_connections(self) -> list[ClientProtocol]:
        return [each for each in self.server_state.connections if isinstance(each, ClientProtocol)]


def _in_progress(service: Service) -> str:
    """Describe what is in progress, for example ``1 request and 2 registrations``."""
    counts = {"request": len(service.event_router), "registration": service.registration_limits.in_progress}
    return " and ".join(_count(count, noun) for noun, count in counts.items() if count)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
