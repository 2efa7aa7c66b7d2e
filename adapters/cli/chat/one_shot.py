"""One question and its answer, for scripts: the plain text on the standard output, and nothing else."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing

from adapters.cli.chat.answer import Answer
from adapters.cli.chat.safe_text import encodable, visible
from adapters.cli.chat.session import ChatSession, fetch
from adapters.cli.chat.speaker import BadInput


def read_question() -> str:
    """Read the standard input. Raises BadInput."""
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise BadInput(f"the question is not UTF-8 (byte {error.start})") from error


async def answer_once(session: ChatSession, question: str) -> None:
    """Print the answer while it comes, or several, one after the other with a line that names who gives it.

    Raises RemoteError, after what has come was printed.
    """
    question = encodable(question.strip())
    if not question:
        raise BadInput("the question is empty")
    # A file or another program gets the answer as it is; a terminal gets no control character.
    clean: Callable[[str], str] = visible if sys.stdout.isatty() else encodable
    bodies = [session.body(each, question) for each in session.conversations]
    if len(bodies) == 1:
        await _print_stream(session, bodies[0], clean)
        return
    answers = [Answer() for _ in bodies]
    await asyncio.gather(*(fetch(session.client, body, answer) for body, answer in zip(bodies, answers, strict=True)))
    _print_all([each.speaker.label for each in session.conversations], answers, clean)


async def _print_stream(session: ChatSession, body: dict[str, object], clean: Callable[[str], str]) -> None:
    answer, shown = Answer(), 0
    try:
        async with aclosing(session.client.stream(body)) as chunks:
            async for chunk in chunks:
                answer.take(chunk)
                # A carriage return may be the first half of a line's end.
                ready = len(answer.text) - answer.text.endswith("\r")
                _write(clean(answer.text[shown:ready]))
                shown = ready
    finally:
        _write(clean(answer.text[shown:]) + ("" if answer.text.endswith("\n") or not answer.text else "\n"))


def _print_all(labels: Sequence[str], answers: Sequence[Answer], clean: Callable[[str], str]) -> None:
    for label, answer in zip(labels, answers, strict=True):
        _write(f"== {label} ==\n{clean(answer.text)}" + ("" if answer.text.endswith("\n") else "\n"))
    for answer in answers:
        if answer.error is not None:
            raise answer.error


def _write(text: str) -> None:
    if not text:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has left, as `head` does. Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
