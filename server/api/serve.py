"""``manylora serve``: load, listen, answer, drain."""

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
from bases.interrupts import end_at_once
from server.api.app import create_app
from server.api.http.half_close import HalfCloseProtocol
from server.api.service import Service
from server.api.startup import open_resources, open_service
from server.compute.cpu.memory import give_back
from server.config import Settings, service_links
from server.listener import bind

log = logging.getLogger(__name__)

LINGER = 5
"""Seconds that connections get to close once every request has been answered."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs. Raises ConfigError and BaseRejected before it listens."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    log_environment()
    torch.set_num_threads(1)  # on this thread, for the reason Engine.start gives
    # Found out first: loading a base takes a while.
    with bind(settings.host, settings.port) as listener, open_resources(settings) as opened:
        base = load_base(settings.base, print_line)
        service = open_service(base, settings, print_line, opened)
        give_back()
        DrainingServer(service).run(sockets=[listener])


def log_environment() -> None:
    """Say what the environment holds that this server does not go by."""
    if links := service_links():
        log.info("Kubernetes' service links are no options, and left out: %s", ", ".join(links))
    if os.environ.get("MANYLORA_API_KEY"):
        log.warning(
            "MANYLORA_API_KEY is set, but this server asks nobody for a key: whoever reaches it may use and change it. "
            "The variable is what `manylora adapters`, `train` and `bench` send."
        )


def print_line(line: str) -> None:
    """Tell the person who started the server."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def startup_message(service: Service, listener: socket.socket) -> str:
    """The last lines of a start: the address, and a request that works as it stands."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    body: dict[str, object] = {"model": service.base.name, "temperature": 0, "max_tokens": 64}
    if service.codec.chats:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path, body["prompt"] = "completions", "The capital of France is"
    curl = f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"serving {service.base.name} on {url}; try\n{curl}"


class DrainingServer(uvicorn.Server):
    """uvicorn, but after the first signal it goes on until open requests, uploads and registrations have ended.

    Meanwhile new ones get 503, so that a load balancer sees where it stands. A second signal ends the process at once.
    """

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=HalfCloseProtocol,
                ws="none",
                log_config=None,
                log_level=logging.DEBUG if service.settings.log_level == "debug" else logging.WARNING,
                access_log=False,  # middleware.py writes one
                timeout_keep_alive=service.settings.keep_alive_seconds,
                timeout_graceful_shutdown=LINGER,
            )
        )
        self._service = service
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so when requests are taken."""
        # Connections inherit it, so that the next server can bind beside what is left of them.
        for listener in sockets or ():
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        if self.started and sockets:
            print_line(startup_message(self._service, sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal. The next ends the process at once."""
        signal.signal(signal.SIGINT, end_at_once)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.drain()
        # Not from here: what it interrupts may be writing to stdout itself.
        asyncio.get_running_loop().call_soon_threadsafe(self._report_progress, sig)

    def _report_progress(self, sig: int) -> None:
        """Say what is waited for."""
        if self._service.in_progress:
            again = "; press Ctrl-C again to stop now" if sig == signal.SIGINT else ""
            print_line(f"finishing {_in_progress(self._service)}{again}")

    def drain(self) -> None:
        """Take nothing new; end when nothing is open, or ``drain_seconds`` from now."""
        self._service.event_router.draining = True
        self._deadline = monotonic() + self._service.settings.drain_seconds
        # Clients and balancers that keep connections learn it with their next answer.
        self.config.encoded_headers.append((b"connection", b"close"))

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._deadline is not None:
            late = monotonic() > self._deadline
            if late:
                log.warning("Not ended in time: %s", _in_progress(self._service))
                # The engine's last events end them, so that their clients learn why.
                await asyncio.to_thread(self._service.engine.stop)
            self.should_exit = late or not self._service.in_progress
        return await super().on_tick(counter)


def _in_progress(service: Service) -> str:
    """Such as ``1 request and 2 registrations``."""
    counts = {"request": len(service.event_router), "registration": service.registration_limits.in_progress}
    return " and ".join(f"{count} {noun}{'' if count == 1 else 's'}" for noun, count in counts.items() if count)
