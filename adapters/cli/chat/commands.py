"""``manylora chat`` on the command line.

Exit status: 0; 1 if the server refuses or cannot be reached; 2 for a bad option; 130 after Ctrl-C.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from adapters.cli.chat.client import ChatClient
from adapters.cli.chat.one_shot import answer_once, read_question
from adapters.cli.chat.sampling import parse_setting
from adapters.cli.chat.session import ChatSession
from adapters.cli.chat.speaker import BadInput, Speaker, parse_speaker
from adapters.cli.connection import DEFAULT_URL, ApiKey, Url, connect
from bases import interrupts
from bases.command_line import APP
from bases.extras import require

chat = typer.Typer(**APP)


@chat.command()
def talk(
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="answer this and end (unset: talk)", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="who answers: an adapter, NAME@VERSION, an alias, base, or a mix as legal=0.7+german=0.3; several "
            "answer side by side (unset: base)",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="system prompt")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="temperature, top_p, max_tokens, seed, ...; may be repeated"),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", metavar="", help="show answers as they are written")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Talk with a running server: with the base, an adapter, or several side by side.

    On a terminal, /help lists the commands. With QUESTION, or with a question on the standard input, prints the plain
    answer and ends.

    Example: manylora chat --adapter legal --adapter base
    """
    speakers = [parse_speaker(name) for name in adapter or ()]
    sampling = dict(parse_setting(setting) for setting in settings or ())
    talks = question is None and sys.stdin.isatty()
    if talks and not sys.stdout.isatty():
        raise BadInput("the output is no terminal to talk on: give the question as an argument")
    if talks:
        require("chat", "chat")
    with interrupts.sigint_raises(), interrupts.sigterm_raises():
        client = connect(ChatClient, url, api_key)
        if question is None and not talks:
            question = read_question()
        try:
            asyncio.run(_run(client, question, speakers, system, sampling, plain))
        except BrokenPipeError:
            raise typer.Exit(1) from None


async def _run(
    client: ChatClient,
    question: str | None,
    speakers: Sequence[Speaker],
    system: str | None,
    sampling: dict[str, Any],
    plain: bool,
) -> None:
    async with client:
        console = Console(highlight=False)
        session = ChatSession(client, await client.base(), console)
        if speakers:
            await session.choose(speakers)
        session.system, session.sampling, session.plain = system, sampling, plain
        if question is not None:
            await answer_once(session, question)
        else:
            from adapters.cli.chat.dialogue import Dialogue

            await Dialogue(session, console).run()
