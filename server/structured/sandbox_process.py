"""SandboxProcess: the server's end of the sandbox."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import Any

from server.errors import EngineError
from server.structured.sandbox import CPU_SECONDS, MEMORY
from server.structured.spec import GrammarSpec

_ROOT = Path(__file__).parents[2]
PATIENCE = 10.0
"""Seconds after which a sandbox is killed that neither answers nor uses its processor time."""


class SandboxProcess:
    """Compiles grammars in a process of its own, which may end at any of them. For one thread."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        """``setup`` is the first line of its input: ``tokenizer``, ``vocabulary``, ``end`` and ``special``."""
        self._setup = setup
        self._process: subprocess.Popen[str] | None = None

    def translate(self, spec: GrammarSpec) -> str:
        """Llguidance's form of a grammar that can be compiled.

        Raises ValueError with the reason if it cannot, and EngineError if the process ends for another reason, such as
        the machine's lack of memory.
        """
        process = self.start()
        timer = Timer(PATIENCE, process.kill)
        timer.start()
        try:
            line = _exchange(process, [spec.kind, spec.source])
        finally:
            timer.cancel()
        if not line:
            self._reap()
            raise _error(process.returncode)
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["grammar"]

    def start(self) -> subprocess.Popen[str]:
        """Start the process, unless it runs. It then takes a while to read the tokenizer."""
        if self._process is not None and self._process.poll() is not None:  # killed while it waited
            self._reap()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.structured.sandbox"],
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # Rust's last words when memory ends
                text=True,
                encoding="utf-8",
            )
            _write(self._process, self._setup)
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def _reap(self) -> None:
        """Wait for the end of the process, and forget it."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def _exchange(process: subprocess.Popen[str], message: object) -> str:
    """Send a line, and return the answer: an empty one if the process has ended."""
    assert process.stdout is not None
    _write(process, message)
    return process.stdout.readline()


def _write(process: subprocess.Popen[str], message: object) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return  # it has ended: reading finds that, too


def _error(code: int) -> ValueError | EngineError:
    """What ended the process, by its return code: the grammar, or something that has nothing to do with it."""
    match -code:
        case signal.SIGPROF:
            return ValueError(f"compiling it takes more than {CPU_SECONDS:g} s of processor time; make it smaller")
        case signal.SIGABRT | signal.SIGSEGV | signal.SIGBUS:
            return ValueError(f"compiling it takes more than {MEMORY >> 20} MiB of memory; make it smaller")
        case _:
            return EngineError(f"The process that compiles grammars has ended (code {code}).")
