"""Cancels an asyncio benchmark on Ctrl-C, SIGTERM or SIGHUP, so that it can still remove its adapters."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_cancellable(main: Coroutine[None, None, T]) -> T:
    """Run ``main`` and return its result. Each signal cancels it; raises KeyboardInterrupt when it ended cancelled.

    ``asyncio.run`` would stop at the second Ctrl-C, in the middle of the cleanup.
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
