"""Shows the progress of a benchmark on stderr: a bar on a terminal, else a line every ten seconds at most."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Least time between two lines where there is no bar."""


class Display:
    """Prints messages and progress."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """Print a line without markup or line breaks."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Show the progress of ``total`` items. Gives a function to call once for each item done."""
        if (
            self._console.is_interactive and self._console.file.isatty()
        ):  # FORCE_COLOR makes rich take a log file for a terminal
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
            with Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True) as bar:
                task = bar.add_task(title, total=total)
                yield lambda: bar.advance(task)
        else:
            yield self._lines(title, total)

    def _lines(self, title: str, total: int) -> Callable[[], None]:
        done, printed_at = 0, time.monotonic()

        def tick() -> None:
            nonlocal done, printed_at
            done += 1
            if time.monotonic() - printed_at >= LINE_SECONDS:
                printed_at = time.monotonic()
                self.say(f"{title}: {done} of {total}")

        return tick
