"""How far an upload is, on a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from adapters.client import Progress


@contextmanager
def upload_bar(name: str) -> Iterator[Progress]:
    """A bar on a terminal's stderr for an upload, and for the server's checks after it."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(f"uploading {name}", total=None)

        def advance(sent: int, total: int) -> None:
            bars.update(task, completed=sent, total=total)
            if sent == total:
                bars.update(task, description="checking on the server ...")

        yield advance
