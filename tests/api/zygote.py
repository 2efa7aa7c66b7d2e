"""A process with everything imported and a tiny model built: for each line on its input it forks a server.

A line is a number and a folder. The server answers on the port it prints (``zygote PID PORT``), until the step of a
change with that number (counted from the first that touches the folder after the start), where it is gone as after
``kill -9``; 0 is none.
Steps are what reaches the system or the database: making, opening to write, renaming, deleting; statements, commits.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine, event

from server.api.serve import DrainingServer, bind
from tests.api.live import tiny_service
from tests.tiny import tiny_model

_WRITES = os.O_WRONLY | os.O_RDWR


class Fault:
    """Kills the process at its n-th step."""

    def __init__(self, at: int, folder: Path) -> None:
        self._left = at
        self._folder = str(folder)
        self.armed = False

    def install(self) -> None:
        """Start counting steps."""
        sys.addaudithook(self._audit)
        for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(Engine, name, lambda *_: self._step())
        self.armed = True

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        match name, arguments:
            case "open", (path, _, flags) if not flags & _WRITES:
                return
            case (("open" | "os.mkdir" | "os.rename" | "os.remove" | "os.rmdir"), (path, *_)):
                # rmtree passes names relative to an open folder.
                if name in ("os.remove", "os.rmdir") or str(path).startswith(self._folder):
                    self._step()

    def _step(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def serve(at: int, root: Path) -> None:
    """Serve until killed; print the process id and the port first."""
    service = tiny_service(root, tiny_model(), max_rank=16)
    listener = bind("127.0.0.1", 0)
    listener.listen()  # a client may connect as soon as it knows the port
    if at:
        Fault(at, root / "data").install()
    sys.stdout.write(f"zygote {os.getpid()} {listener.getsockname()[1]}\n")
    sys.stdout.flush()
    DrainingServer(service).run(sockets=[listener])


def main() -> None:
    """Fork a server for each line of the input."""
    torch.set_num_threads(1)
    tiny_model()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped automatically
    for line in sys.stdin:
        at, root = line.rstrip("\n").split(" ", 1)
        if os.fork() == 0:
            try:
                serve(int(at), Path(root))
            finally:
                os._exit(1)


if __name__ == "__main__":
    main()
