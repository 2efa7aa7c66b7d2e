"""Views: answers on a terminal while they stream: one that grows downwards, or several side by side."""

from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adapters.cli.chat.pane import Line, Lines, Pane, rendered_lines

NARROWEST = 36
"""Columns of a pane; with fewer, panes stand one below the other."""
GAP = 3
"""Columns between two panes."""
MARGIN = 2
"""Lines of the terminal that a view leaves free, so that it never scrolls while it is redrawn."""


class View(Protocol):
    """What a session shows answers with: a context, within which :meth:`refresh` shows what has come."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Show the whole answers."""

    def refresh(self) -> None: ...


def view_of(console: Console, panes: Sequence[Pane], base: str) -> View:
    """Return the view for so many answers. ``base``: the base's name."""
    return OneView(console, panes[0], base) if len(panes) == 1 else PanesView(console, panes, base)


class OneView:
    """One answer. What has settled is printed for good, so that it can be scrolled back to at once."""

    def __init__(self, console: Console, pane: Pane, base: str) -> None:
        self._console, self._pane, self._base = console, pane, base
        self._live = _live(console)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()
        self._print(self._pane.settle(complete=True))
        self._console.print(self._pane.ending(self._base), Text())

    def refresh(self) -> None:
        """Print what has settled, and redraw the rest."""
        self._print(self._pane.settle())
        rows = max(self._console.height - MARGIN - 1, 1)
        tail = rendered_lines(self._console, self._pane.tail(), self._console.width)
        self._live.update(Group(Lines(tail[-rows:]), self._pane.status(monotonic())), refresh=True)

    def _print(self, blocks: Sequence[RenderableType]) -> None:
        if blocks:
            self._console.print(Lines(rendered_lines(self._console, blocks, self._console.width)), end="")


class PanesView:
    """Several answers to one message. While they stream their ends are shown, then all of them."""

    def __init__(self, console: Console, panes: Sequence[Pane], base: str) -> None:
        self._console, self._panes, self._base = console, panes, base
        self._live = _live(console)
        self._width = 0
        self._settled: list[list[Line]] = []

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()
        self._restart_at(self._pane_width())
        self._console.print(
            self._arranged([self._lines(index, complete=True) for index in range(len(self._panes))], ended=True)
        )

    def refresh(self) -> None:
        """Redraw the ends of all answers."""
        width = self._pane_width()
        if width != self._width:
            self._restart_at(width)
        height = self._console.height - MARGIN
        rows = max((height if self._beside() else height // len(self._panes)) - 2, 1)
        shown = [self._lines(index)[-rows:] for index in range(len(self._panes))]
        self._live.update(self._arranged(shown, ended=False), refresh=True)

    def _beside(self) -> bool:
        """Whether panes have room side by side."""
        count = len(self._panes)
        return (self._console.width - GAP * (count - 1)) // count >= NARROWEST

    def _pane_width(self) -> int:
        count = len(self._panes) if self._beside() else 1
        return (self._console.width - GAP * (count - 1)) // count

    def _restart_at(self, width: int) -> None:
        self._width, self._settled = width, [[] for _ in self._panes]
        for pane in self._panes:
            pane.restart()

    def _lines(self, index: int, *, complete: bool = False) -> list[Line]:
        pane, settled = self._panes[index], self._settled[index]
        settled += rendered_lines(self._console, pane.settle(complete=complete), self._width)
        return settled + rendered_lines(self._console, pane.tail(), self._width)

    def _arranged(self, shown: Sequence[Sequence[Line]], *, ended: bool) -> RenderableType:
        cells = [
            Group(
                Text(pane.title, style="bold reverse", no_wrap=True, overflow="ellipsis"),
                Lines(lines),
                pane.ending(self._base) if ended or _has_ended(pane) else pane.status(monotonic()),
            )
            for pane, lines in zip(self._panes, shown, strict=True)
        ]
        if not self._beside():
            return Group(*[part for cell in cells for part in (cell, Text())][:-1])
        table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for _ in cells:
            table.add_column(width=self._width)
        table.add_row(*cells)
        return table


def _has_ended(pane: Pane) -> bool:
    answer = pane.answer
    return answer.finish is not None or answer.stopped or answer.error is not None


def _live(console: Console) -> Live:
    """Return a display that is redrawn when asked, and leaves nothing behind."""
    return Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
