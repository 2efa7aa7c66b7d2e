"""Progress of a long operation: a bar on a terminal, otherwise a line every few seconds."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adapters.cli.upload_bar import LINE_SECONDS, draws_bars

Say = Callable[[str], None]
Advance = Callable[[int], None]
"""Called with the amount of work done since the last call."""


@contextmanager
def progress_bar(title: str, total: int, say: Say, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Show the progress over ``total`` items, or bytes: as a bar on a terminal, else as lines passed to ``say``."""
    console = Console(stderr=True)
    if not draws_bars(console):
        yield _lines(title, total, say, in_bytes)
        return
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda more: bar.advance(task, more)


def _lines(title: str, total: int, say: Say, in_bytes: bool) -> Advance:
    done, last_line = 0, -math.inf

    def advance(more: int) -> None:
        nonlocal done, last_line
        done += more
        if time.monotonic() - last_line >= LINE_SECONDS or done == total:
            last_line = time.monotonic()
            say(f"{title}: {decimal(done)} of {decimal(total)}" if in_bytes else f"{title}: {done} of {total}")

    advance(0)
    return advance
