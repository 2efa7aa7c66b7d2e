"""Prompt: reads a message or a command from a terminal, with editing, history and completion."""

from collections.abc import Callable, Iterator, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from adapters.cli.chat.line import COMMANDS
from adapters.cli.chat.sampling import FIELDS
from bases.errors import one_line

LONGEST_PROMPT = 40
"""Characters of the names in front of the text."""
MOST_SHOWN = 200
"""Names in the menu."""
FILES = ("save", "load")
"""Commands whose argument is a file."""


class ChatCompleter(Completer):
    """Completes commands, then their arguments: names, settings, files."""

    def __init__(self, names: Callable[[], Sequence[str]]) -> None:
        """``names`` returns what the server is known to have."""
        self._names = names
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Return completions of the word before the cursor, if the text is a command."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        command, space, argument = text[1:].partition(" ")
        if not space:
            for name, (_, what) in COMMANDS.items():
                if name.startswith(command):
                    yield Completion(f"/{name}", -len(text), display_meta=what)
        elif command in FILES:
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif command == "adapter":
            yield from _matches(argument.rpartition(" ")[2].rpartition("+")[2], self._names())
        elif command == "set" and " " not in argument:
            for name, what in FIELDS.items():
                if name.startswith(argument):
                    yield Completion(name, -len(argument), display_meta=what)


def _matches(word: str, names: Sequence[str]) -> Iterator[Completion]:
    """Complete names that begin with a word, then those that contain it."""
    first = [name for name in names if name.startswith(word)]
    then = [name for name in names if word in name and not name.startswith(word)]
    for name in [*first, *then][:MOST_SHOWN]:
        yield Completion(name, -len(word), display=one_line(name))


class Prompt:
    """Reads what is typed. Enter sends it; Alt-Enter, or a backslash at the end, begins another line."""

    def __init__(self, history: History, names: Callable[[], Sequence[str]]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=ChatCompleter(names),
            complete_while_typing=Condition(self._is_command),
            complete_in_thread=False,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=FormattedText([("class:continuation", "  ")]),
            reserve_space_for_menu=5,
        )

    async def read(self, names: str) -> str:
        """Read a text. Raises EOFError for Ctrl-D, and KeyboardInterrupt for Ctrl-C, on an empty line.

        ``names``: who answers.
        """
        names = one_line(names)
        short = names if len(names) <= LONGEST_PROMPT else names[: LONGEST_PROMPT - 1] + "…"
        return await self._session.prompt_async(FormattedText([("bold fg:ansigreen", f"{short}> ")]))

    def _is_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        state = buffer.complete_state
        if state is not None and state.current_completion is not None:
            buffer.complete_state = None  # it is in the text already
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def clear_or_end(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
