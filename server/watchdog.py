"""Watchdog: notices an engine step that does not end, and ends the process if it never does.

A thread looks at the engine once a second. After :data:`STUCK_SECONDS` the server reports itself as not ready, so that
it gets no further requests; it stays alive, for a step that is only slow still ends, and its requests with it. After
``--step-timeout`` nothing can be saved: a thread that hangs in a native call cannot be ended. Then the stacks of all
threads are written to stderr and the process ends with :data:`EXIT_STATUS`, for its supervisor to restart.
"""

import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from threading import Event, Thread, Timer
from time import monotonic

from server.engine.resilience.step_watch import StepWatch

log = logging.getLogger(__name__)

STUCK_SECONDS = 8.0
"""Seconds after which a step counts as stuck: with the thread's own period, within 10."""
EXIT_STATUS = 70
"""Exit status of a server whose step did not end (``EX_SOFTWARE`` of sysexits.h)."""
PERIOD = 1.0
"""Seconds between two looks."""
WRITE_SECONDS = 5.0
"""Seconds to write the stacks: the step may hang because nobody reads stderr."""


class Stall:
    """How long the engine has been at one step. Pure: its time is what it is told.

    A pause of the whole process (SIGSTOP, a suspended machine) counts as at most two periods, however long it was.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._step: int | None = None
        self._last = 0.0
        self._patience = self._calm = 0.0
        self.seconds = 0.0

    def look(self, step: int | None, patience: float, calm: float, now: float) -> None:
        """Take in which step runs ``now``, None for none.

        It may take ``patience`` seconds in any case, and ``calm`` of them without counting as stuck.
        """
        if step is None or step != self._step:
            self.seconds = 0.0
        else:
            self.seconds += min(max(now - self._last, 0.0), 2 * PERIOD)
        self._step, self._patience, self._calm, self._last = step, patience, calm, now

    @property
    def stuck(self) -> bool:
        """Whether the step takes so long that the server should get no more requests."""
        return self.seconds >= max(min(STUCK_SECONDS, self._timeout), self._calm)

    @property
    def hopeless(self) -> bool:
        """Whether it will not end."""
        return self.seconds >= max(self._timeout, self._patience)


class Watchdog:
    """The thread that watches an engine's steps. ``expire`` is called once if one does not end."""

    def __init__(self, watch: StepWatch, timeout: float, expire: Callable[[float], None] | None = None) -> None:
        """``timeout``: seconds. By default ``expire`` is :func:`end_process`."""
        self._watch = watch
        self._stall = Stall(timeout)
        self._expire = expire or end_process
        self._stop = Event()
        self._thread = Thread(target=self._run, name="watchdog", daemon=True)

    @property
    def stuck(self) -> bool:
        """Whether a step takes too long. For any thread."""
        return self._stall.stuck

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        warned = False
        while not self._stop.wait(PERIOD):
            step = self._watch.current
            number, patience, calm = (step.number, step.patience, step.calm) if step else (None, 0.0, 0.0)
            self._stall.look(number, patience, calm, monotonic())
            if self._stall.stuck != warned:
                warned = self._stall.stuck
                self._report(warned)
            if self._stall.hopeless:
                self._expire(self._stall.seconds)
                return

    def _report(self, stuck: bool) -> None:
        """Log it on another thread: the step may hang in a log call itself, and hold what this one would wait for."""
        text = "A step has not ended for %.0f s: not ready" if stuck else "The step has ended: ready again"
        arguments = (self._stall.seconds,) if stuck else ()
        Thread(target=log.warning, args=(text, *arguments), daemon=True).start()


def end_process(seconds: float) -> None:
    """Write the stacks of all threads to stderr and end the process, with whatever else it is doing."""
    last_resort = Timer(WRITE_SECONDS, os._exit, (EXIT_STATUS,))
    last_resort.daemon = True
    last_resort.start()
    sys.stderr.write(
        f"manylora: a step has not ended for {seconds:.0f} s (--step-timeout); the process ends with status "
        f"{EXIT_STATUS}. What its threads are doing:\n"
    )
    sys.stderr.flush()
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_STATUS)
