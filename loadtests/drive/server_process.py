"""Starts a server for one benchmark and stops it at the end."""

import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# The first two are imported here, not by httpx2's first request: a Ctrl-C while a library creates its classes would
# end Python by the signal.
import h11  # noqa: F401
import httpcore2  # noqa: F401
import httpx2

from loadtests.errors import BadOption, ServerUnusable

START_SECONDS = 600.0
"""Longest start. The first start of a model quantises it."""
STOP_SECONDS = 60.0
STDERR = 2


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that was started for a load test."""

    url: str
    pid: int


@contextmanager
def spawned(command: str, adapter_root: Path) -> Iterator[ServerProcess]:
    """Run ``command --port PORT --adapter-root DIR`` on a free port and stop it at the end. Gives it when it is ready.

    The server's output goes to stderr. Raises :class:`ServerUnusable`, and :class:`BadOption` for a command that cannot
    be parsed.
    """
    port = _free_port()
    try:
        arguments = [*shlex.split(command), "--port", str(port), "--adapter-root", str(adapter_root)]
    except ValueError:
        raise BadOption(f"--spawn: has an unclosed quotation mark (got {command!r})") from None
    try:
        # Its own process group: Ctrl-C on a terminal must not stop the server before its adapters are removed.
        process = subprocess.Popen(arguments, stdout=STDERR, process_group=0)
    except OSError as error:
        reason = "there is no such command" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise ServerUnusable(f"--spawn: {arguments[0]}: {reason}") from error
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(process, url)
        yield ServerProcess(url, process.pid)
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx2.Client(base_url=url, trust_env=False) as http:
        while not _ready(http):
            if (status := process.poll()) is not None:
                raise ServerUnusable(
                    f"the server ended with status {status} before it was ready; its messages above say why"
                )
            if time.monotonic() > deadline:
                raise ServerUnusable(
                    f"the server was not ready after {START_SECONDS:.0f} s; start it yourself and give its address "
                    "with --url instead of --spawn"
                )
            time.sleep(0.2)


def _ready(http: httpx2.Client) -> bool:
    try:
        return http.get("/readyz").status_code == httpx2.codes.OK
    except httpx2.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server with SIGTERM, and kill it after STOP_SECONDS or at a second Ctrl-C."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()
