"""Follower: a thread that looks again and again for what others have changed in a database."""

import logging
import threading
from collections.abc import Callable

from adapters.errors import AdapterError


class Follower:
    """Calls ``refresh`` every ``seconds``. Logs its failures, an AdapterError only the first time in a row."""

    def __init__(
        self, what: str, refresh: Callable[[], object], seconds: float, stale: str, log: logging.Logger
    ) -> None:
        """``what`` is followed, such as keys; ``stale`` says what holds while it cannot be read."""
        self._what = what
        self._refresh = refresh
        self._seconds = seconds
        self._stale = stale
        self._log = log
        self._available = True
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._follow, name=self._what, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                self._refresh()
                self._available = True
            except AdapterError as error:
                if self._available:
                    self._log.warning("%s: %s", self._stale, error)
                self._available = False
            except Exception:
                # The thread must survive any error: it has to see the next change.
                self._log.exception("could not read the %s; will try again", self._what)
