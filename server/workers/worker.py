"""The worker's side: answers the server's requests, each within a limit of CPU time. Imports the standard library only.

Messages are JSON behind their length in bytes (4 bytes, little-endian), on standard input and output.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LENGTH_BYTES = 4

Answer = Callable[[Any], dict[str, Any]]
"""Request -> answer. One that has ``last`` is the worker's last: it ends, and another starts when it is needed."""


def encoded(message: Any) -> bytes:
    """Return a message as it is sent."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def serve(prepare: Callable[[Any], Answer], cpu_seconds: float) -> None:
    """Answer requests until standard input ends.

    ``prepare`` gets the setup that the server sends first, limits the process, and returns what answers requests. The
    kernel ends the process, by SIGPROF, at a request that takes longer than ``cpu_seconds``, also within one long
    operation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answer = prepare(_receive(requests))
    _send(answers, {})
    while (request := _receive(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        found = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(answers, found)
        if "last" in found:
            return


def limit(memory: int, others: Mapping[int, int] | None = None) -> None:
    """Take no more than ``memory`` bytes of address space from now on, write no core dumps, and keep other limits.

    ``others``: number of a limit, as ``resource.RLIMIT_NOFILE``, -> its value.
    """
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: _address_space() + memory, **(others or {})}
    for number, value in limits.items():
        with suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(number, (value, value))


def _send(stream: IO[bytes], message: Any) -> None:
    stream.write(encoded(message))
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Return the next message; None at the end."""
    head = stream.read(LENGTH_BYTES)
    return json.loads(stream.read(int.from_bytes(head, "little"))) if head else None


def _address_space() -> int:
    """Return the address space of this process in bytes; a guess where Linux's /proc is missing."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 256 << 20
