"""The process that renders chat templates of uploads: no files, little memory, and half a second of CPU time for each.

It reads requests from standard input and writes answers to standard output, each a JSON object behind its length (4
bytes, little-endian). Imports the standard library and jinja2 only.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import jinja2.debug  # noqa: F401 - jinja imports it with the first error, when files can no longer be opened

from server.text.template_environment import TemplateFailure, render

CPU_SECONDS = 0.5
"""CPU time for one template. The kernel ends the process after it, also within one long operation of Python's."""
MEMORY_BYTES = 256 << 20
"""Address space that the process may take beyond what it has when it starts."""
LENGTH_BYTES = 4
OUT_OF_MEMORY = "it needs too much memory"

_WARM_UP = "{% for n in range(2) %}{{ strftime_now('%Y %b') ~ ([n]|tojson(indent=1)) ~ '%s'|format(n) }}{% endfor %}"
"""What a template may make Python import or open must be there before files can no longer be opened."""


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message."""
    data = json.dumps(message).encode()
    stream.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    stream.flush()


def main() -> None:
    """Answer requests until standard input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    render(_WARM_UP, {})
    _limit()
    send(answers, {})
    while head := requests.read(LENGTH_BYTES):
        request = json.loads(requests.read(int.from_bytes(head, "little")))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            answer: dict[str, Any] = {"text": render(request["template"], request["variables"])}
        except TemplateFailure as failure:
            answer = {"failure": str(failure), "fatal": failure.fatal}
        except MemoryError:
            answer = {"failure": OUT_OF_MEMORY, "fatal": True, "last": True}
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(answers, answer)
        if "last" in answer:
            return  # what is left of the memory may be in pieces


def _limit() -> None:
    """Give up what rendering does not need: more memory, new files, larger files, other processes, core dumps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limits = {
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        getattr(resource, "RLIMIT_NPROC", None): 0,
        resource.RLIMIT_AS: _address_space() + MEMORY_BYTES,
    }
    for limit, value in limits.items():
        if limit is not None:
            with suppress(ValueError, OSError):  # macOS knows no limit of the address space
                resource.setrlimit(limit, (value, value))


def _address_space() -> int:
    """Return the address space of this process in bytes; a guess where Linux's /proc is missing."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 256 << 20
