"""A terminal: a command of ours in a pseudo-terminal, and what its screen shows."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyte

from tests.api.live import PATIENCE

ROOT = Path(__file__).parents[2]


class _Screen(pyte.HistoryScreen):
    """A screen that answers the question where its cursor is, as terminals do."""

    terminal: int

    def write_process_input(self, data: str) -> None:
        os.write(self.terminal, data.encode())


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int, columns: int, lines: int) -> None:
        self.process = process
        self.raw = b""
        """All that the process has written."""
        self._terminal = terminal
        self._written = threading.Condition()  # on an RLock
        self._screen = _Screen(columns, lines, history=10_000, ratio=1e-9)
        self._screen.terminal = terminal
        self._stream = pyte.ByteStream(self._screen)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the process has ended
            while written := os.read(self._terminal, 65536):
                with self._written:
                    self.raw += written
                    self._stream.feed(written)
                    self._written.notify_all()

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def enter(self, text: str) -> None:
        """Type a line."""
        self.type(text + "\r")

    def resize(self, columns: int, lines: int) -> None:
        """Change the size of the window."""
        with self._written:
            self._screen.resize(lines, columns)
        set_size(self._terminal, columns, lines)

    def screen(self) -> str:
        """Return what the window shows, without the spaces at the ends of lines."""
        with self._written:
            return "\n".join(line.rstrip() for line in self._screen.display)

    def text(self) -> str:
        """Return what has left the window at its top, then what it shows."""
        with self._written:
            width = self._screen.columns
            gone = ["".join(line[at].data for at in range(width)).rstrip() for line in self._screen.history.top]
            return "\n".join([*gone, *(line.rstrip() for line in self._screen.display)])

    def see(self, wanted: str, times: int = 1) -> str:
        """Wait until the text has ``wanted``, ``times`` times; return the text."""
        with self._written:
            seen = self._written.wait_for(lambda: self.text().count(wanted) >= times, PATIENCE)
            assert seen, f"{wanted!r} is not in:\n{self.text()}"
            return self.text()

    @property
    def settings(self) -> list[Any]:
        """What ``termios.tcgetattr`` returns for it."""
        return termios.tcgetattr(self._terminal)

    def ended(self) -> int:
        """Wait until the process has ended; return its exit status."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


def set_size(terminal: int, columns: int, lines: int) -> None:
    """Set the size of a terminal. Its process gets SIGWINCH."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@contextmanager
def command(
    *words: str, columns: int = 100, lines: int = 30, environment: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Run ``manylora`` with these words on a terminal; end it afterwards."""
    ours, theirs = pty.openpty()
    set_size(theirs, columns, lines)
    started = [sys.executable, "-m", "manylora", *words]
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        started,
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**variables, "TERM": "xterm-256color", **(environment or {})},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is its signal
    )
    os.close(theirs)
    terminal = Terminal(process, ours, columns, lines)
    try:
        yield terminal
    finally:
        process.kill()
        process.wait(PATIENCE)
        terminal.ended()
        os.close(ours)
