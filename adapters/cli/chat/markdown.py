"""Markdown of a model's answer, for a terminal: whole, or block by block while it streams."""

from dataclasses import dataclass
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from adapters.cli.chat.safe_text import visible

# Without `html`: rich would leave tags out, and so what the model wrote.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


_CONTAINERS = frozenset(("blockquote_open", "list_item_open"))


class AnswerMarkdown(Markdown):
    """The Markdown that models write: a line break is one, and a tag is text.

    Links show their addresses, which a terminal's own links would hide.
    """

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")
        self.markup = visible(text)
        self.parsed = _PARSER.parse(self.markup)
        for block in self.parsed:
            for token in block.children or ():
                if token.type == "softbreak":
                    token.type = "hardbreak"

    @property
    def incomplete(self) -> bool:
        """Whether quotes or lists are nested so deeply that the parser left out what is in them."""
        deepest = _PARSER.options.maxNesting - 1
        return any(token.type in _CONTAINERS and token.level >= deepest for token in self.parsed)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in super().__rich_console__(console, options):
            # Once more, for an entity such as `&#x202e;` is a character only now.
            yield Segment(visible(segment.text), segment.style) if isinstance(segment, Segment) else segment


class Format(Protocol):
    """How answers are shown."""

    @property
    def gap(self) -> bool:
        """Whether an empty line separates two blocks."""

    def render(self, text: str) -> Markdown | Text:
        """Return a text as rich shows it."""

    def settled(self, text: str) -> int:
        """Return the length of the blocks at the beginning of ``text`` that further text does not change.

        ``text`` has no control characters but tabs and line feeds.
        """


@dataclass(frozen=True, slots=True)
class MarkdownFormat:
    """Blocks of Markdown."""

    gap: bool = True

    def render(self, text: str) -> Markdown | Text:
        """Return a text as Markdown, or as it was written if the parser cannot read all of it."""
        markdown = AnswerMarkdown(text)
        return PlainFormat().render(text) if markdown.incomplete else markdown

    def settled(self, text: str) -> int:
        """Return the length of all blocks before the last one, which may go on."""
        starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
        if not starts or not starts[-1]:
            return 0
        return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]])


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """Text as it was written, line by line."""

    style: str = ""
    gap: bool = False

    def render(self, text: str) -> Text:
        """Return a text as it is."""
        return Text(visible(text).removesuffix("\n"), style=self.style)

    def settled(self, text: str) -> int:
        """Return the length of the complete lines."""
        return text.rfind("\n") + 1
