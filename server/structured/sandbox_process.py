"""SandboxProcess: the server's end of the sandbox."""

import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from server.errors import EngineError
from server.structured.sandbox import CPU_SECONDS, MEMORY
from server.structured.spec import GrammarSpec
from server.workers.process import WorkerProcess

PATIENCE = 10.0
"""Seconds after which a sandbox is killed that neither answers nor uses its processor time."""


class SandboxProcess:
    """Compiles grammars in a process of its own, which may end at any of them. For one thread."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        """``setup`` has ``tokenizer``, ``vocabulary``, ``end`` and ``special``."""
        self._worker = WorkerProcess("server.structured.sandbox", setup, patience=PATIENCE)

    def translate(self, spec: GrammarSpec) -> str:
        """Llguidance's form of a grammar that can be compiled.

        Raises ValueError with the reason if it cannot, and EngineError if the process ends for another reason, such as
        the machine's lack of memory.
        """
        answer, status = self._worker.ask([spec.kind, spec.source])
        if answer is None:
            raise _error(status)
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["grammar"])

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process, unless it runs, and wait until it has read the tokenizer."""
        return self._worker.start()

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def _error(code: int) -> ValueError | EngineError:
    """What ended the process, by its return code: the grammar, or something that has nothing to do with it."""
    match -code:
        case signal.SIGPROF:
            return ValueError(f"compiling it takes more than {CPU_SECONDS:g} s of processor time; make it smaller")
        case signal.SIGABRT | signal.SIGSEGV | signal.SIGBUS:
            return ValueError(f"compiling it takes more than {MEMORY >> 20} MiB of memory; make it smaller")
        case _:
            return EngineError(f"The process that compiles grammars has ended (code {code}).")
