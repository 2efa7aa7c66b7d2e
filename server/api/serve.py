"""``manylora serve``: load the base, listen, serve requests, drain."""

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
from time import monotonic
from types import FrameType

import torch
import uvicorn

import bases.nf4  # noqa: F401 - before transformers, for the reason it gives
from bases.base import load_base
from bases.interrupts import exit_at_once
from server.api.app import create_app
from server.api.http.half_close import HalfCloseProtocol
from server.api.service import Service
from server.api.startup import open_resources, open_service
from server.compute.cpu.memory import trim_memory
from server.config import Settings, service_links
from server.listener import bind

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5
"""Seconds for connections to close after the last request has been served."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish open requests. Raises ConfigError or BaseRejected before listening."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    log_environment()
    torch.set_num_threads(1)  # on this thread, for the reason Engine.start gives
    # Opened first: errors show at once and not after minutes of loading the base.
    with bind(settings.host, settings.port) as listener, open_resources(settings) as opened:
        base = load_base(settings.base, print_line)
        service = open_service(base, settings, print_line, opened)
        trim_memory()
        DrainingServer(service).run(sockets=[listener])


def log_environment() -> None:
    """Log environment variables that users may expect to have an effect but have none."""
    if links := service_links():
        log.info(
            "Ignoring these environment variables, which are Kubernetes service links and not options: %s",
            ", ".join(links),
        )
    if os.environ.get("MANYLORA_API_KEY"):
        log.warning(
            "MANYLORA_API_KEY is set, but this server does not check keys: anybody who can reach it may use and "
            "change it. Only `manylora adapters`, `train` and `bench` use the variable, as the key that they send."
        )


def print_line(line: str) -> None:
    """Print a line to stdout, unbuffered."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def startup_message(service: Service, listener: socket.socket) -> str:
    """Return the last lines printed at startup: the address, and an example request to copy."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    body: dict[str, object] = {"model": service.base.name, "temperature": 0, "max_tokens": 64}
    if service.codec.template is not None:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path, body["prompt"] = "completions", "The capital of France is"
    curl = f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"serving {service.base.name} on {url}; try\n{curl}"


class DrainingServer(uvicorn.Server):
    """A uvicorn server that, after the first signal, finishes open requests, uploads and registrations before it exits.

    Meanwhile new requests get 503, which load balancers understand. A second signal ends the process immediately.
    """

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=HalfCloseProtocol,
                ws="none",
                log_config=None,
                log_level=logging.DEBUG if service.settings.log_level == "debug" else logging.WARNING,
                access_log=False,  # middleware.py writes the access log
                timeout_keep_alive=service.settings.keep_alive_seconds,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._service = service
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and print the startup message."""
        # Connections inherit this option, so that the next server can bind while old connections still close.
        for listener in sockets or ():
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        if self.started and sockets:
            print_line(startup_message(self._service, sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle the first signal: start to drain. The next signal ends the process immediately."""
        signal.signal(signal.SIGINT, exit_at_once)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.drain()
        # Do not print in a signal handler: the interrupted code may be printing, too.
        asyncio.get_running_loop().call_soon_threadsafe(self._report_progress, sig)

    def _report_progress(self, sig: int) -> None:
        """Print what the server is waiting for."""
        if self._service.in_progress:
            again = "; press Ctrl-C again to stop now" if sig == signal.SIGINT else ""
            print_line(f"finishing {_in_progress(self._service)}{again}")

    def drain(self) -> None:
        """Accept no new requests; exit when nothing is in progress, or after ``drain_seconds``."""
        self._service.event_router.draining = True
        self._deadline = monotonic() + self._service.settings.drain_seconds
        # Clients and load balancers with open connections see this in their next response.
        self.config.encoded_headers.append((b"connection", b"close"))

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: return whether to exit."""
        if self._deadline is not None:
            late = monotonic() > self._deadline
            if late:
                log.warning(
                    "Still in progress at the end of the drain time, and aborted: %s", _in_progress(self._service)
                )
                # Stopping the engine fails these requests with an error message that their clients receive.
                await asyncio.to_thread(self._service.engine.stop)
            self.should_exit = late or not self._service.in_progress
        return await super().on_tick(counter)


def _in_progress(service: Service) -> str:
    """Describe what is in progress, for example ``1 request and 2 registrations``."""
    counts = {"request": len(service.event_router), "registration": service.registration_limits.in_progress}
    return " and ".join(f"{count} {noun}{'' if count == 1 else 's'}" for noun, count in counts.items() if count)
