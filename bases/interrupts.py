"""Ctrl-C: silent, with exit status 130, at whatever moment it comes.

Until there is something to clean up, above all while modules are imported, the process ends on the spot: a
KeyboardInterrupt within an import ends as a traceback, or is swallowed by the library that is importing. Where there is
something to clean up (:func:`raised`), it is a KeyboardInterrupt. One that comes within an import is put off until that
is over; one that comes within a finalizer (``__del__``), where nobody can catch it, is raised once more afterwards.
"""

import _thread
import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130
"""What a shell makes of a process that SIGINT has ended."""
_IMPORTING = "<frozen importlib._bootstrap>"
_PATIENCE = 0.02
"""Seconds between looks whether an import is over."""


def end_silently() -> None:
    """From now on Ctrl-C ends the process on the spot. For a process's first lines; where it is ignored it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
        # Runs last, being the first. Then Python takes itself apart, and can call no handler any more.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler of SIGINT."""
    os._exit(STATUS)


@contextmanager
def raised() -> Iterator[None]:
    """While it lasts Ctrl-C is a KeyboardInterrupt. Nothing changes in a process that would not end on the spot."""
    if signal.getsignal(signal.SIGINT) is not end_at_once:
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    hook, sys.unraisablehook = sys.unraisablehook, _raise_later
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end_at_once)
        sys.unraisablehook = hook
        # Python remembers a KeyboardInterrupt that passed through code compiled from text, such as a dataclass in the
        # making, and ends by the signal whatever status it is told; until such code runs again.
        exec("")


@contextmanager
def ends_raised() -> Iterator[None]:
    """While it lasts SIGTERM and SIGHUP are a KeyboardInterrupt, too: what was half made is taken away.

    For the main thread. What is ignored, as SIGHUP under nohup, stays so.
    """
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(each, _raise)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    if not _importing(frame):
        raise KeyboardInterrupt
    _come_again()


def _raise_later(unraisable: "sys.UnraisableHookArgs") -> None:
    """For what is raised where nobody can catch it: Python would print it and go on."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _come_again()
    else:
        sys.__unraisablehook__(unraisable)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _come_again() -> None:
    """Interrupt once more, in a moment."""
    # Not threading's: this may have interrupted it while it holds its lock.
    _thread.start_new_thread(_interrupt, (_thread.get_ident(),))


def _interrupt(main_thread: int) -> None:
    time.sleep(_PATIENCE)
    signal.pthread_kill(main_thread, signal.SIGINT)
