"""Print tables of a server's JSON objects: as wide as the terminal, or tab-separated without one."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from bases.errors import one_line

_MOMENTS = ("created", "checked")
"""Fields that hold Unix time."""
_DIGEST = re.compile(r"[0-9a-f]{40,}")
_SHOWN = 12
"""Number of digits of a digest that a terminal shows."""


def show_table(columns: Sequence[str], rows: Iterable[Iterable[object]], none: str = "") -> None:
    """Print a table; if the output is no terminal, print tab-separated lines with whole digests.

    ``none``: a message for stderr if there are no rows.
    """
    console = Console()
    lines = [[one_line(cell_text(cell)) for cell in row] for row in rows]
    if not lines and none:
        typer.echo(none, err=True)
    if not console.is_terminal:
        for line in ([*columns], *lines):
            typer.echo("\t".join(line))
    elif lines:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in columns:
            table.add_column(column, overflow="fold")
        for line in lines:
            table.add_row(*(Text(_short(cell)) for cell in line))  # a str would be read as markup, and `[4, 64]` vanish
        console.print(table)


def show_fields(fields: Mapping[str, object]) -> None:
    """Print the fields of a JSON object, nested ones by their path: ``receipt.probe.kl``."""
    show_table(("field", "value"), _flat(fields))


def cell_text(value: object) -> str:
    """Format a value: four significant digits, yes and no, a dash for nothing."""
    match value:
        case None | "" | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)


def _moment(seconds: float) -> str:
    """Format Unix time as date and time."""
    return f"{moment(seconds)} UTC"


def moment(seconds: float) -> str:
    """Format Unix time as date and time to the second, UTC, for a column whose title says so."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def minute(seconds: float) -> str:
    """Format Unix time as date and time to the minute, UTC, for a column whose title says so."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _flat(inside, f"{path}.{key}" if path else str(key))
        return
    parent, dot, field = path.rpartition(".")
    if field in _MOMENTS and isinstance(value, int):
        yield path, _moment(value)
    elif field == "size_bytes" and isinstance(value, int):
        yield f"{parent}{dot}size", decimal(value)
    else:
        yield path, value


def _short(cell: str) -> str:
    return f"{cell[:_SHOWN]}…" if _DIGEST.fullmatch(cell) else cell
