"""How far an upload is: a bar on a terminal, a line now and then elsewhere; always on stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from adapters.cli.client import Progress

LINE_SECONDS = 10.0
"""Between two lines where there is no bar."""


@contextmanager
def upload_bar(name: str) -> Iterator[Progress]:
    """Told of an upload, and of the server's checks after it."""
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
    """Whether it is a terminal that can: not TERM=dumb, and no log file, of which FORCE_COLOR makes no terminal."""
    return console.is_interactive and console.file.isatty()


def _lines(name: str, console: Console) -> Progress:
    """Nothing of an upload that is quick."""
    began = told = time.monotonic()

    def advance(sent: int, total: int) -> None:
        nonlocal told
        now, whole = time.monotonic(), sent == total
        if now - told >= LINE_SECONDS or (whole and told > began):
            told = now
            how = "all of it; the server checks it" if whole else f"{decimal(sent)} of {decimal(total)}"
            console.print(f"uploading {name}: {how}", markup=False, highlight=False, soft_wrap=True)

    return advance
