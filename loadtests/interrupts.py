"""Ctrl-C, and SIGTERM and SIGHUP as if they were one: what was put on the server is taken away before the end."""

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

ENDS = (signal.SIGTERM, signal.SIGHUP)
SIGNALS = (signal.SIGINT, *ENDS)


@contextmanager
def ends_as_ctrl_c() -> Iterator[None]:
    """While it lasts; in the main thread. What is ignored, as SIGHUP under nohup, stays so."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in ENDS}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run(main: Coroutine[None, None, T]) -> T:
    """``main`` to its end; each signal cancels it once more, and KeyboardInterrupt is raised when it has ended so.

    ``asyncio.run`` would break off at the second Ctrl-C, in the middle of what cleans up.
    """
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(main)
        for each, handler in before.items():
            if handler is not signal.SIG_IGN:
                loop.add_signal_handler(each, task.cancel)
        try:
            return loop.run_until_complete(task)
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            for each, handler in before.items():
                loop.remove_signal_handler(each)
                signal.signal(each, handler)
