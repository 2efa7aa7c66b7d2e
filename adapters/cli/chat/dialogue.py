"""Dialogue: reads lines from a terminal, sends messages and does what commands say, until the user ends it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.cli.chat import chat_file
from adapters.cli.chat.conversation import Conversation
from adapters.cli.chat.history import open_history
from adapters.cli.chat.line import COMMANDS, Message, read_line
from adapters.cli.chat.prompt import Prompt
from adapters.cli.chat.safe_text import encodable
from adapters.cli.chat.sampling import FIELDS, UNSET, parse_value
from adapters.cli.chat.session import ChatSession
from adapters.cli.chat.speaker import BadInput, Speaker, parse_speaker
from adapters.cli.client import RemoteError
from bases.errors import ManyloraError, one_line

NAMES_AGE = 30.0
"""Seconds after which the names for completion are fetched again, with the next prompt."""


class Dialogue:
    """The loop of a chat on a terminal."""

    def __init__(self, session: ChatSession, console: Console) -> None:
        self._session = session
        self._console = console
        self._names: list[str] = []
        self._named_at: float | None = None
        self._files: set[Path] = set()
        """Files that this chat has written or read, and may replace."""
        self.commands: Mapping[str, Callable[[str], Awaitable[None] | None]] = {
            "help": self._help,
            "adapter": self._adapter,
            "base": lambda _: session.choose([Speaker(session.base)]),
            "system": self._system,
            "set": self._set,
            "plain": self._plain,
            "retry": lambda _: session.retry(),
            "undo": self._undo,
            "clear": self._clear,
            "save": self._save,
            "load": self._load,
            "stats": self._stats,
        }
        """Command -> what does it with its argument; all but ``quit``."""

    async def run(self) -> None:
        """Talk until Ctrl-D or /quit. Raises KeyboardInterrupt for Ctrl-C at an empty prompt."""
        history, trouble = open_history()
        prompt = Prompt(history, lambda: self._names)
        self._say(f"{self._session.client.url}, base {self._session.base}. /help lists the commands, Ctrl-D ends.")
        if trouble is not None:
            self._say(trouble)
        fetching = None
        while True:
            if self._named_at is None or monotonic() - self._named_at > NAMES_AGE:
                fetching = asyncio.create_task(self._fetch_names())
            names = ", ".join(each.speaker.label for each in self._session.conversations)
            try:
                text = await prompt.read(names)
            except EOFError:
                break
            if not await self._do(encodable(text)):
                break
        if fetching is not None:
            fetching.cancel()

    async def _do(self, text: str) -> bool:
        """Do what a typed text says. Return False to end."""
        try:
            line = read_line(text)
            if isinstance(line, Message):
                await self._session.ask(line.text)
            elif line is not None and line.name == "quit":
                return False
            elif line is not None:
                doing = self.commands[line.name](line.argument)
                if doing is not None:
                    await doing
        except ManyloraError as error:
            for reason in error.terminal_lines():
                self._console.print(Text(one_line(reason), style="red"))
        return True

    async def _fetch_names(self) -> None:
        self._named_at = monotonic()
        try:
            self._names = await self._session.client.names()
        except RemoteError:
            self._named_at = None  # completion can wait; a message will say what is wrong

    def _say(self, text: str) -> None:
        self._console.print(Text(one_line(text), style="dim"))

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, (argument, what) in COMMANDS.items():
            table.add_row(Text(f"/{name} {argument}".strip(), no_wrap=True, style="bold"), Text(what))
        table.add_row(Text("Alt-Enter", style="bold"), Text("another line; a backslash before Enter does the same"))
        table.add_row(Text("Ctrl-C", style="bold"), Text("stops an answer, and keeps what came; clears what is typed"))
        table.add_row(Text("Ctrl-D", style="bold"), Text("ends"))
        self._console.print(table)

    async def _adapter(self, argument: str) -> None:
        words = [word for word in argument.replace(",", " ").split() if word]
        if not words:
            raise BadInput("name who answers: /adapter NAME ..., or /base")
        await self._session.choose([parse_speaker(word) for word in words])

    def _system(self, argument: str) -> None:
        if argument:
            self._session.system = None if argument == UNSET else argument
        self._say(f"system prompt: {self._session.system or 'none'}")

    def _set(self, argument: str) -> None:
        sampling = self._session.sampling
        name, _, value = argument.partition(" ")
        if value.strip() == UNSET and name in FIELDS:
            sampling.pop(name, None)
        elif name:
            sampling[name] = parse_value(name, value.strip())
        said = ", ".join(f"{field} {chosen}" for field, chosen in sampling.items())
        self._say(said or f"all settings are the server's; there are {', '.join(FIELDS)}")

    def _plain(self, _: str) -> None:
        self._session.plain = not self._session.plain
        self._say("answers are shown as they are written" if self._session.plain else "answers are shown as Markdown")

    def _undo(self, _: str) -> None:
        self._say(f"removed: {self._session.undo()}")

    def _clear(self, _: str) -> None:
        for each in self._session.conversations:
            each.turns = []
        self._session.resume()
        self._files.clear()
        self._say("a new conversation")

    def _save(self, argument: str) -> None:
        path = _path(argument, "save")
        conversations, system = self._session.conversations, self._session.system
        rows = chat_file.save(path, conversations, system, replace=path in self._files)
        self._files.add(path)
        self._say(f"saved {rows} conversation{'' if rows == 1 else 's'} to {path}")

    async def _load(self, argument: str) -> None:
        session = self._session
        word, _, number = argument.rpartition(" ")
        name, row = (word, int(number)) if word and number.isdecimal() else (argument, None)
        path = _path(name, "load")
        chats = chat_file.load(path)
        if row is not None and not 1 <= row <= len(chats):
            raise BadInput(f"{path} has rows 1 to {len(chats)}, not {row}")
        chosen = chats if row is None and chat_file.belong_together(chats) else [chats[(row or 1) - 1]]
        if chosen[0].adapter is not None:
            await session.choose([parse_speaker(chat.adapter or session.base) for chat in chosen])
        if len(chosen) == 1:
            chosen *= len(session.conversations)
        for conversation, chat in zip(session.conversations, chosen, strict=True):
            conversation.turns = list(chat.turns)
        session.system = chosen[0].system
        session.resume()
        if chosen[0].pending is not None:
            session.number, session.prompt = session.number + 1, chosen[0].pending
        self._files.add(path)
        self._say(_loaded(session.conversations, len(chats), all_rows=chosen is chats))
        if chosen[0].pending is not None:
            self._say("its last message has no answer: /retry asks for one")

    def _stats(self, _: str) -> None:
        if not self._session.totals:
            raise BadInput("there are no answers yet")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("who", "answers", "prompt", "cached", "output", "tokens/s", "first text, s"):
            table.add_column(column, justify="left" if column == "who" else "right", header_style="bold")
        for name, total in self._session.totals.items():
            rate = f"{total.output_tokens / total.seconds:.1f}" if total.seconds else "-"
            first = f"{total.to_first_text / total.answers:.2f}" if total.answers else "-"
            counts = (total.answers, total.prompt_tokens, total.cached_tokens, total.output_tokens)
            table.add_row(Text(one_line(name)), *(f"{count:,}" for count in counts), rate, first)
        self._console.print(table)


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise BadInput(f"name a file: /{command} FILE")
    return Path(argument).expanduser().absolute()


def _loaded(conversations: list[Conversation], rows: int, *, all_rows: bool) -> str:
    turns = max(len(each.turns) for each in conversations)
    said = f"{turns} message{'' if turns == 1 else 's'} with {', '.join(each.speaker.label for each in conversations)}"
    return said if all_rows or rows == 1 else f"{said}; the file has {rows} rows: /load FILE ROW reads another"
