"""How far a part of the work is: a bar on a terminal, a line now and then elsewhere."""

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
"""Told how much more is done."""


@contextmanager
def progress_bar(title: str, total: int, say: Say, *, in_bytes: bool = False) -> Iterator[Advance]:
    """While ``total`` things, or bytes, are being done. A log file gets no bar: only what ``say`` is told."""
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
    done, told = 0, -math.inf

    def advance(more: int) -> None:
        nonlocal done, told
        done += more
        if time.monotonic() - told >= LINE_SECONDS or done == total:
            told = time.monotonic()
            say(f"{title}: {decimal(done)} of {decimal(total)}" if in_bytes else f"{title}: {done} of {total}")

    advance(0)
    return advance
