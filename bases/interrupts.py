"""Handles Ctrl-C at any moment: no traceback, exit status 130.

While there is nothing to clean up, above all during imports, the process exits at once: a KeyboardInterrupt in an
import would print a traceback, or be swallowed by the importing library. Where there is something to clean up
(:func:`sigint_raises`), Ctrl-C raises KeyboardInterrupt. During an import it is delayed until the import has ended. In
a finalizer (``__del__``), where nobody can catch it, it is raised again afterwards.
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
"""Exit status that a shell reports for a process ended by SIGINT."""
_IMPORTING = "<frozen importlib._bootstrap>"
_PATIENCE = 0.02
"""Seconds before a delayed interrupt is sent again."""


def exit_on_sigint() -> None:
    """Make Ctrl-C exit the process at once, unless SIGINT is ignored. Call it in the first lines of a process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_at_once)
        # Registered first, so it runs last: Python then shuts down and can call no handler.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Exit the process. A handler for SIGINT."""
    os._exit(STATUS)


@contextmanager
def sigint_raises() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt within the context, in a process that called :func:`exit_on_sigint`."""
    if signal.getsignal(signal.SIGINT) is not exit_at_once:
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    hook, sys.unraisablehook = sys.unraisablehook, _raise_later
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, exit_at_once)
        sys.unraisablehook = hook
        # If a KeyboardInterrupt passed through code compiled from text, such as a dataclass's, Python remembers it and
        # ends by the signal whatever the exit status. Running such code again resets that.
        exec("")


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt within the context, so that unfinished files are removed.

    Must be used in the main thread. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
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
    _interrupt_later()


def _raise_later(unraisable: "sys.UnraisableHookArgs") -> None:
    """Handle an exception that nobody can catch, which Python would print and ignore: repeat a KeyboardInterrupt."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _interrupt_later()
    else:
        sys.__unraisablehook__(unraisable)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _interrupt_later() -> None:
    """Send SIGINT to this thread again, in a moment."""
    # Not `threading`: this handler may have interrupted it while it holds a lock.
    _thread.start_new_thread(_interrupt, (_thread.get_ident(),))


def _interrupt(main_thread: int) -> None:
    time.sleep(_PATIENCE)
    signal.pthread_kill(main_thread, signal.SIGINT)
