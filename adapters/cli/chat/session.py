"""ChatSession: the conversations of one run, and how a message is asked and answered."""

import asyncio
import signal
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from rich.console import Console

from adapters.cli.chat.answer import Answer
from adapters.cli.chat.client import ChatClient
from adapters.cli.chat.conversation import Conversation, with_speakers
from adapters.cli.chat.markdown import MarkdownFormat, PlainFormat
from adapters.cli.chat.pane import Pane
from adapters.cli.chat.speaker import BadInput, Speaker
from adapters.cli.chat.view import View, view_of
from adapters.cli.client import JsonObject, RemoteError

MOST_SPEAKERS = 6
"""Answers to one message at most."""
REFRESH = 0.1
"""Seconds between two looks at what has come."""
SHARE = 0.25
"""Most of the time that drawing may take: the processor may be the server's, too."""
REQUEST: JsonObject = {
    "stream": True,
    # Usage in each chunk, so that an answer that was stopped has its counts.
    "stream_options": {"continuous_usage_stats": True, "progress": True},
}


@dataclass(slots=True)
class Totals:
    """What one speaker has answered."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    """Between first and last text."""
    to_first_text: float = 0.0

    def add(self, answer: Answer) -> None:
        """Add an answer of which something came."""
        if answer.first is None or answer.last is None:
            return
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        self.output_tokens += answer.output_tokens
        self.seconds += answer.last - answer.first
        self.to_first_text += answer.first - answer.started


class ChatSession:
    """Who answers, what was said, and the settings of requests."""

    def __init__(self, client: ChatClient, base: str, console: Console) -> None:
        self.client = client
        self.base = base
        self.console = console
        self.conversations: list[Conversation] = [Conversation(Speaker(base))]
        self.system: str | None = None
        self.sampling: dict[str, Any] = {}
        self.plain = False
        self.number = 0
        """Of the last message."""
        self.prompt: str | None = None
        """The last message, which ``/retry`` sends again."""
        self.totals: defaultdict[str, Totals] = defaultdict(Totals)
        # An alias may mean several versions: one session stays with one of them.
        self._user = f"chat-{uuid.uuid4().hex}"

    async def choose(self, names: Sequence[Speaker]) -> None:
        """Let these speakers answer from now on. Raises RemoteError if the server has no such one; BadInput."""
        if len(names) > MOST_SPEAKERS:
            raise BadInput(f"at most {MOST_SPEAKERS} answer at the same time (got {len(names)})")
        known = [await self.client.known(each, self.base) for each in names]
        self.conversations = with_speakers(self.conversations, known)

    async def ask(self, prompt: str) -> None:
        """Send a message to all speakers, and show their answers."""
        self.number += 1
        self.prompt = prompt
        await self._answer(prompt)

    async def retry(self) -> None:
        """Ask the last message again; what comes replaces its answers."""
        if self.prompt is None:
            raise BadInput("there is no message yet")
        await self._answer(self.prompt)

    def undo(self) -> str:
        """Remove the last turn of all conversations; return its message."""
        numbers = [turn.number for each in self.conversations for turn in each.turns]
        if not numbers:
            raise BadInput("there is nothing to undo")
        removed = next(t.prompt for each in self.conversations for t in each.turns if t.number == max(numbers))
        for each in self.conversations:
            each.turns = [turn for turn in each.turns if turn.number < max(numbers)]
        self.resume()
        return removed

    def resume(self) -> None:
        """Make the last turn the one that ``/retry`` asks again."""
        turns = [turn for each in self.conversations for turn in each.turns]
        last = max(turns, key=lambda turn: turn.number, default=None)
        self.number, self.prompt = (0, None) if last is None else (last.number, last.prompt)

    def body(self, conversation: Conversation, prompt: str) -> JsonObject:
        """Return the request for the next answer of a conversation."""
        messages = conversation.messages(self.system, prompt, before=self.number)
        return {**conversation.speaker.fields(), "messages": messages, "user": self._user, **self.sampling, **REQUEST}

    async def _answer(self, prompt: str) -> None:
        answers = [Answer() for _ in self.conversations]
        form = PlainFormat() if self.plain else MarkdownFormat()
        panes = [
            Pane(each.speaker.label, answer, form) for each, answer in zip(self.conversations, answers, strict=True)
        ]
        tasks = [
            asyncio.create_task(fetch(self.client, self.body(each, prompt), answer))
            for each, answer in zip(self.conversations, answers, strict=True)
        ]
        await asyncio.sleep(0)  # they begin: a task that was cancelled before could not say so
        try:
            with sigint_cancels(tasks), silent_keyboard(), view_of(self.console, panes, self.base) as view:
                await _follow(tasks, view)
        finally:
            for task in tasks:
                task.cancel()
        for conversation, answer in zip(self.conversations, answers, strict=True):
            self.totals[conversation.speaker.label].add(answer)
            if answer.kept:
                conversation.keep(self.number, prompt, answer)


async def fetch(client: ChatClient, body: JsonObject, answer: Answer) -> None:
    """Stream an answer; cancelling stops it. Its error becomes part of it."""
    try:
        async with aclosing(client.stream(body)) as chunks:
            async for chunk in chunks:
                answer.take(chunk)
    except RemoteError as error:
        answer.error = error
    except asyncio.CancelledError:
        answer.stopped = True


async def _follow(tasks: Sequence[asyncio.Task[None]], view: View) -> None:
    """Show what comes until all have ended."""
    pending = set(tasks)
    pause = REFRESH
    while pending:
        _, pending = await asyncio.wait(pending, timeout=pause)
        before = monotonic()
        view.refresh()
        pause = max(REFRESH, (monotonic() - before) / SHARE)
    for task in tasks:
        task.result()  # raises what is no error of the server's


@contextmanager
def sigint_cancels(tasks: Sequence[asyncio.Task[None]]) -> Iterator[None]:
    """Make Ctrl-C cancel these tasks within the context, rather than end the process."""

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    before = signal.getsignal(signal.SIGINT)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


@contextmanager
def silent_keyboard() -> Iterator[None]:
    """Show no keys that are pressed within the context; the next prompt reads them. Ctrl-C stays a signal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    # NOFLSH, lest Ctrl-C drops what was typed before it.
    flags = (before[3] & ~(termios.ECHO | termios.ICANON)) | termios.NOFLSH
    silent = [*before[:3], flags, *before[4:]]
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, silent)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
