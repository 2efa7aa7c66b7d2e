"""Keys on a terminal, read one at a time and without Enter."""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

HANG_UP = "q"
"""Returned once the terminal is gone."""
Wait = Callable[[float], str | None]
"""Wait so many seconds for a key, and return it; None if there was none, or the window has another size."""


@contextmanager
def keyboard() -> Iterator[Wait]:
    """Give a function that waits for a key. Without a terminal there are none, and it only waits."""
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    with _resized() as resized:
        try:
            tty.setcbreak(terminal)
            yield lambda seconds: _key(seconds, resized)
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def _resized() -> Iterator[int]:
    """Give a file that can be read once the window has another size: a signal alone would not end a wait."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)

    def write(*_: object) -> None:
        with suppress(BlockingIOError):  # full: it can be read already
            os.write(writable, b"\0")

    before = signal.signal(signal.SIGWINCH, write)
    try:
        yield readable
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(readable)
        os.close(writable)


def _key(seconds: float, resized: int) -> str | None:
    terminal = sys.stdin.fileno()
    ready, _, _ = select.select([terminal, resized], [], [], max(seconds, 0.0))
    if resized in ready:
        os.read(resized, 4096)
    # Not sys.stdin.read: it would keep a second key in a buffer, which select knows nothing of.
    return (os.read(terminal, 1).decode(errors="replace") or HANG_UP) if terminal in ready else None


def _no_keys(seconds: float) -> None:
    select.select([], [], [], max(seconds, 0.0))
