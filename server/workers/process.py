"""WorkerProcess: the server's end of a worker."""

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from server.errors import EngineError
from server.workers.worker import LENGTH_BYTES, encoded

_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
"""All that a worker gets to see of the environment."""
_ROOT = Path(__file__).parents[2]
_CHUNK = 1 << 20


class WorkerProcess:
    """Asks a worker, one request after the other. It starts with the first, and again if it has ended.

    For one thread at a time.
    """

    def __init__(self, module: str, setup: Any = None, *, patience: float) -> None:
        """``module``: its ``main`` calls :func:`server.workers.worker.serve`, which hands it ``setup``, JSON.

        ``patience``: seconds after which a worker that neither answers nor uses its CPU time is given up, for the
        machine is overloaded, or it is stopped.
        """
        self._module = module
        self._setup = setup
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Any) -> tuple[dict[str, Any] | None, int]:
        """Return the answer; None if the process has ended instead, or had to be ended, with its status.

        Raises EngineError if it does not start.
        """
        self.start()
        answer = self._exchange(request)
        status = self._end() if answer is None or "last" in answer else 0
        return answer, status

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process and wait until it is ready, unless it runs. Raises EngineError if it does not start."""
        if self._process is not None and self._process.poll() is not None:  # it was killed while it waited
            self._end()
        if self._process is None:
            self._process = self._popen()
            if self._exchange(self._setup) is None:
                self._end()
                raise EngineError(f"The process of {self._module} does not start.")
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()

    def _popen(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[0] = {str(_ROOT)!r}; from {self._module} import main; main()",
            ],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a library's last words when memory ends
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C at the server's terminal is not for it
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _exchange(self, message: Any) -> dict[str, Any] | None:
        """Send a message and return the answer; None if the process ends before, or takes too long."""
        deadline = monotonic() + self._patience
        with suppress(BrokenPipeError):
            if not self._write(encoded(message), deadline):
                return None
        head = self._read(LENGTH_BYTES, deadline)
        data = None if head is None else self._read(int.from_bytes(head, "little"), deadline)
        if data is None:
            return None
        answer: dict[str, Any] = json.loads(data)
        return answer

    def _write(self, data: bytes, deadline: float) -> bool:
        """Write ``data``. Returns False if that takes too long. Raises BrokenPipeError if the process has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        descriptor, left = self._process.stdin.fileno(), memoryview(data)
        while left:
            _, ready, _ = select.select([], [descriptor], [], max(deadline - monotonic(), 0))
            if not ready:
                return False
            left = left[os.write(descriptor, left) :]
        return True

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
