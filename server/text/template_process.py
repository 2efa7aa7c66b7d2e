"""TemplateProcess: renders chat templates of uploads in a process that cannot do harm.

jinja's sandbox keeps a template from Python's internals, but not from looping for ever or filling the memory, and a
thread cannot be stopped. A process can: the kernel ends it when its half second of CPU time is over.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

from server.text.template_environment import TemplateFailure
from server.text.template_worker import CPU_SECONDS, LENGTH_BYTES, send

MAX_WAIT = 30.0
"""Seconds after which a process that uses no CPU time is given up: the machine is overloaded, or it is stopped."""
MAX_REFUSED = 4096
"""Templates that are remembered because they took too long."""
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
"""All that the process gets to see of the environment."""
_ROOT = Path(__file__).parents[2]
_SCRIPT = f"import sys; sys.path[0] = {str(_ROOT)!r}; from server.text.template_worker import main; main()"
_CHUNK = 1 << 20


class TemplateProcess:
    """Renders templates, one after the other. Starts its process with the first one. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        """Digests of templates that took too long, or ended the process -> the reason."""

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return what the template writes. Raises TemplateFailure with the reason if it does not within its limits.

        A template that exceeds the time is not tried again: it would take a core for half a second with each request.
        """
        digest = sha256(source.encode(errors="surrogatepass")).digest()
        with self._lock:
            if digest in self._refused:
                raise TemplateFailure(self._refused[digest], fatal=True)
            request = {"template": source, "variables": dict(variables)}
            answer, status = self._ask(request)
            if answer is None and status != -signal.SIGPROF:
                answer, status = self._ask(request)  # something else may have ended the process
            if answer is None:
                raise TemplateFailure(self._refuse(digest, status), fatal=True)
        if "failure" in answer:
            raise TemplateFailure(answer["failure"], fatal=answer["fatal"])
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._end()

    def _refuse(self, digest: bytes, status: int) -> str:
        """Remember and return why a template with which the process ended is refused."""
        slow = status in (-signal.SIGPROF, -signal.SIGKILL)
        reason = (
            f"it takes longer than {CPU_SECONDS:g} s of CPU time" if slow else "it ends the process that renders it"
        )
        self._refused[digest] = reason
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        return reason

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any] | None, int]:
        """Return the answer; None if the process has ended instead, or had to be, with its status."""
        process = self._process or self._start()
        assert process.stdin is not None
        answer = None
        with suppress(BrokenPipeError):
            send(process.stdin, request)
            answer = self._receive()
        status = self._end() if answer is None or answer.get("last") else 0
        return answer, status

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,  # Ctrl-C at the server's terminal is not for it
        )
        if self._receive() is None:
            self._end()
            raise RuntimeError("The process that renders chat templates does not start.")
        return process

    def _receive(self) -> dict[str, Any] | None:
        deadline = monotonic() + MAX_WAIT
        head = self._read(LENGTH_BYTES, deadline)
        data = None if head is None else self._read(int.from_bytes(head, "little"), deadline)
        if data is None:
            return None
        answer: dict[str, Any] = json.loads(data)
        return answer

    def _read(self, size: int, deadline: float) -> bytes | None:
        """Return ``size`` bytes of the process's output; None if it ends before, or takes too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        data = bytearray()
        while len(data) < size:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - monotonic(), 0))
            chunk = os.read(descriptor, min(size - len(data), _CHUNK)) if ready else b""
            if not chunk:
                return None
            data += chunk
        return bytes(data)

    def _end(self) -> int:
        """End the process if it has not ended, and return its status."""
        process, self._process = self._process, None
        assert process is not None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(0.05)  # it may just be ending
        process.kill()
        return process.wait()
