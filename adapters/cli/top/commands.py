"""``manylora top`` on the command line.

Exit status: 0; 1 if the server refuses or cannot be reached; 2 for a bad option; 130 after Ctrl-C.
"""

import time
from collections import deque
from typing import Annotated

import httpx2
import typer
from rich.console import Console
from rich.live import Live

from adapters.cli.client import AdapterClient, RemoteError, ServerRefused
from adapters.cli.connection import DEFAULT_URL, Url, connect
from adapters.cli.top.keyboard import keyboard
from adapters.cli.top.scrape import Change, Scrape, parse_scrape
from adapters.cli.top.view import SORT_KEYS, Sort, frame
from bases import interrupts
from bases.command_line import APP

WINDOW = 5
"""Rates and latencies are of so many of the last intervals."""
LINES_ABOVE = 18
"""Lines of a frame above the adapters and below them."""

top = typer.Typer(**APP)


@top.command()
def show(
    url: Url = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MANYLORA_API_KEY", metavar="KEY", help="API key with the scope metrics or admin"),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="time between two looks at the server")
    ] = 2.0,
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help="sort adapters by requests, tokens, latency or name")
    ] = "requests",
    once: Annotated[bool, typer.Option("--once", metavar="", help="print one frame, of one interval, and end")] = False,
) -> None:
    """Watch a running server: requests, adapters, slots, KV memory, latency.

    Keys: q quits; r, t, l and n sort the adapters by requests, tokens, latency and name.

    Example: manylora top --url http://127.0.0.1:8000
    """
    with interrupts.sigint_raises():
        client = connect(AdapterClient, url, api_key)
        with client:
            order = _sort(sort)
            if once:
                first = _look(client)
                time.sleep(interval)
                Console().print(frame(Change(first, _look(client)), client.url, order, rows=1000))
            else:
                _watch(client, interval, order)


def _sort(word: str) -> Sort:
    for order in SORT_KEYS.values():
        if order == word:
            return order
    raise typer.BadParameter(f"{word!r} is none of {', '.join(SORT_KEYS.values())}", param_hint="--sort")


def _look(client: AdapterClient) -> Scrape:
    """Return the server's metrics of now. Raises RemoteError."""
    text = client.metrics()
    try:
        return parse_scrape(text, time.monotonic())
    except ValueError as error:
        raise ServerRefused(200, f"/metrics is not in Prometheus' format: {error}") from error


def _watch(client: AdapterClient, interval: float, sort: Sort) -> None:
    """Show a frame after the other until `q`. A server that does not answer for a while may come back."""
    console = Console()
    looks = deque([_look(client)], maxlen=WINDOW + 1)
    trouble: str | None = None
    with keyboard() as wait, Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        due = time.monotonic()
        while True:
            rows = max(console.height - LINES_ABOVE, 3)
            shown = frame(Change(looks[0], looks[-1]), client.url, sort, rows, trouble)
            live.update(shown, refresh=True)
            key = wait(due + interval - time.monotonic())
            if key == "q":
                return
            sort = SORT_KEYS.get(key or "", sort)
            if time.monotonic() < due + interval:
                continue
            due = time.monotonic()
            try:
                looks.append(_look(client))
                trouble = None
            except RemoteError as error:
                # A proxy answers for a server that restarts.
                if isinstance(error, ServerRefused) and error.status < httpx2.codes.INTERNAL_SERVER_ERROR:
                    raise
                (trouble,) = error.terminal_lines()
