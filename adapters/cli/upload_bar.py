"""Show the progress of an upload on stderr: a bar on a terminal, otherwise a line from time to time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from adapters.cli.client import Progress

LINE_SECONDS = 10.0
"""Seconds between two lines if there is no bar."""


@contextmanager
def upload_bar(name: str) -> Iterator[Progress]:
    """Yield a callback that shows the progress of an upload, then that the server is checking it."""
    console = Console(stderr=True)
    if not draws_bars(console):
        yield _lines(name, console)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(TextColumn("{task.description}"), *columns, console=console) as bars:
        task = bars.add_task(f"uploading {name}", total=None)

        def advance(sent: int, total: int) -> None:
            bars.update(task, completed=sent, total=total)
            if sent == total:
                bars.update(task, description="checking on the server ...")

        yield advance


def draws_bars(console: Console) -> bool:
    """Return whether ``console`` is a terminal that can show bars: not TERM=dumb, nor a file under FORCE_COLOR."""
    return console.is_interactive and console.file.isatty()


def _lines(name: str, console: Console) -> Progress:
    """Return a callback that prints lines; none for an upload that ends within :data:`LINE_SECONDS`."""
    began = printed = time.monotonic()

    def advance(sent: int, total: int) -> None:
        nonlocal printed
        now, whole = time.monotonic(), sent == total
        if now - printed >= LINE_SECONDS or (whole and printed > began):
            printed = now
            how = "all of it; the server checks it" if whole else f"{decimal(sent)} of {decimal(total)}"
            console.print(f"uploading {name}: {how}", markup=False, highlight=False, soft_wrap=True)

    return advance
