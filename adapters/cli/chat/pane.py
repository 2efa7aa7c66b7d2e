"""Pane: one answer as a terminal shows it, while it grows: blocks that stay as they are, and the last one."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from adapters.cli.chat.answer import Answer
from adapters.cli.chat.markdown import Format, PlainFormat
from adapters.cli.chat.safe_text import visible
from bases.errors import one_line

Line = list[Segment]
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
TURN = 0.1
"""Seconds of each of the spinner's pictures."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines that are rendered already."""

    lines: Sequence[Line]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()


class Growing:
    """A text that grows, and how much of it has settled."""

    def __init__(self, format: Format) -> None:
        self._format = format
        self._text = ""
        self._settled = 0
        self._begun = False

    def grow(self, text: str, complete: bool) -> list[RenderableType]:
        """Take the whole text so far; return the blocks of it that have settled since the last call."""
        self._text = visible(text)
        rest = self._text[self._settled :]
        block = rest if complete else rest[: self._format.settled(rest)]
        self._settled += len(block)
        shown = self._rendered(block)
        self._begun = self._begun or bool(shown)
        return shown

    def tail(self) -> list[RenderableType]:
        """Return what has not settled."""
        return self._rendered(self._text[self._settled :])

    def _rendered(self, block: str) -> list[RenderableType]:
        if not (block.strip() if self._format.gap else block):
            return []
        gap = [Text()] if self._format.gap and self._begun else []
        return [*gap, self._format.render(block)]


class Pane:
    """One answer with the name of who gives it."""

    def __init__(self, title: str, answer: Answer, format: Format) -> None:
        self.title = one_line(title)
        self.answer = answer
        self._format = format
        self._thought, self._said = Growing(PlainFormat("dim italic")), Growing(format)

    def settle(self, *, complete: bool = False) -> list[RenderableType]:
        """Return the blocks that have settled since the last call; with ``complete``, all that is left."""
        answer = self.answer
        thought = self._thought.grow(answer.reasoning, complete or bool(answer.text))
        return [*thought, *self._said.grow(answer.text, complete)]

    def tail(self) -> list[RenderableType]:
        """Return what has not settled."""
        return [*self._thought.tail(), *self._said.tail()]

    def restart(self) -> None:
        """Forget what has settled, to render it again at another width."""
        self._thought, self._said = Growing(PlainFormat("dim italic")), Growing(self._format)

    def status(self, now: float) -> Text:
        """Return the line below an answer that is not complete."""
        answer = self.answer
        if answer.first is not None:
            said = f"{answer.output_tokens:,} tokens" + (f", {answer.rate:.1f}/s" if answer.rate is not None else "")
        else:
            said = f"waiting, {now - answer.started:.0f} s"
            if answer.progress is not None:
                said += f"; {answer.progress[0]:,} of {answer.progress[1]:,} tokens of the prompt are read"
        picture = SPINNER[int(now / TURN) % len(SPINNER)]
        return Text(f"{picture} {said}; Ctrl-C stops", style="dim", no_wrap=True, overflow="ellipsis")

    def ending(self, base: str) -> Group:
        """Return the lines below an answer that has ended."""
        answer = self.answer
        lines: list[RenderableType] = []
        if answer.error is not None:
            lines += [Text(line, style="red") for line in answer.error.terminal_lines()]
        if answer.kept:
            lines.append(Text(one_line(answer.summary(base)), style="dim"))
        elif answer.stopped:
            lines.append(Text("stopped before the first text; the message is not kept", style="dim"))
        return Group(*lines)


def rendered_lines(console: Console, blocks: Sequence[RenderableType], width: int) -> list[Line]:
    """Render blocks at a width, without the spaces that would fill lines: they would wrap in a narrower window."""
    options = console.options.update(width=width)
    lines = console.render_lines(Group(*blocks), options, pad=False) if blocks else []
    return [_trimmed(line) for line in lines]


def _trimmed(line: Line) -> Line:
    left = list(line)
    while left and not left[-1].text.strip() and not (left[-1].style and left[-1].style.bgcolor):
        left.pop()
    if left and not (left[-1].style and (left[-1].style.bgcolor or left[-1].style.underline)):
        left[-1] = Segment(left[-1].text.rstrip(), left[-1].style)
    return left
