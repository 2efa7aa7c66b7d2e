"""Servers in processes of their own, forked from one that has everything imported: each starts in a second.

Run as a program, it reads commands, one JSON object a line. ``{"fork": "module:function", ...}`` calls the function
with the other values in a new process, whose output goes to ``log`` in the folder ``root``; the function tells the
parent its port with :func:`ready`. ``{"wait": PID}`` waits for a process and answers with its exit status.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any, Self

import httpx

from tests.api.live import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
_answers = sys.stdout


def ready(port: int) -> None:
    """Tell the parent that the server listens. For forked functions."""
    _answers.write(json.dumps({"pid": os.getpid(), "port": port}) + "\n")
    _answers.flush()


@dataclass(frozen=True)
class Forked:
    """A server in a process of its own."""

    forks: "Forks"
    pid: int
    root: Path
    http: httpx.Client

    def send(self, number: Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end. Returns its exit status; minus the number of the signal that ended it."""
        return int(self.forks.ask(wait=self.pid)["status"])

    def log(self) -> str:
        """What it has written so far."""
        return (self.root / "log").read_text()

    def wait_for_log(self, text: str) -> None:
        """Wait until it has written this."""
        wait_for(lambda: text in self.log())


class Forks:
    """The process that forks. For one test at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.api.forks"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and return the answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(command, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    @contextmanager
    def server(self, function: str, root: Path, **arguments: Any) -> Iterator[Forked]:
        """Run ``module:function(root, **arguments)``; kill it at the end if it has not ended."""
        root.mkdir(parents=True, exist_ok=True)
        answer = self.ask(fork=function, root=root, **arguments)
        pid = answer["pid"]
        assert answer["port"], f"it has not started: {(root / 'log').read_text()}"
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{answer['port']}", timeout=PATIENCE) as http:
                yield Forked(self, pid, root, http)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)


def _fork(function: str, root: str, arguments: dict[str, Any]) -> None:
    """In the new process: call the function, and end."""
    log = os.open(Path(root) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(log, 1)
    os.dup2(log, 2)
    module, _, name = function.partition(":")
    status = 1
    try:
        getattr(importlib.import_module(module), name)(Path(root), **arguments)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _answers.write(json.dumps({"pid": os.getpid(), "port": 0}) + "\n")
        _answers.flush()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Obey the commands on the input."""
    import torch

    from tests.tiny import tiny_model

    torch.set_num_threads(1)
    tiny_model()
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            sys.stdout.write(json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n")
            sys.stdout.flush()
        elif os.fork() == 0:
            _fork(command.pop("fork"), command.pop("root"), command)


if __name__ == "__main__":
    from tests.api import forks  # not __main__, so that forked functions find the same module

    forks.main()
