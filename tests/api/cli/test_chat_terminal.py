"""``manylora chat`` on a terminal, against a real server: what the window shows after what keys."""

import json
import signal
import stat
import termios
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.live import Live, wait_for
from tests.api.terminal import Terminal, command
from training.data.formats import read_conversations

Start = Callable[..., AbstractContextManager[Terminal]]
HOSTILE = "\x1b]0;owned\x07\x1b[2Jgone &#x202e;turned <b>bold</b>\rhidden"


def said(text: str) -> str:
    """Return the setting that makes the model write a text."""
    return "structured_outputs=" + json.dumps({"choice": [text]})


@pytest.fixture
def start(served: Live, tmp_path: Path) -> Start:
    """Start ``manylora chat`` on a terminal."""

    @contextmanager
    def run(*words: str, columns: int = 100, lines: int = 30) -> Iterator[Terminal]:
        environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
        url = ("--url", str(served.http.base_url))
        with command("chat", *url, *words, columns=columns, lines=lines, environment=environment) as terminal:
            terminal.see(">")
            yield terminal
        wait_for(served.idle)

    return run


def test_a_conversation(start: Start, tmp_path: Path) -> None:
    """Messages with their history, commands, errors that do not end it, and a file that training reads."""
    file = tmp_path / "chat.jsonl"
    with start("--system", "Be brief.", "--set", said("It is so.")) as chat:
        chat.enter("First")
        chat.see("It is so.")
        chat.see("prompt 43, ")
        chat.enter("Second")
        chat.see("prompt 79, ")  # the first message, its answer, and the second one
        chat.enter("/undo")
        chat.see("removed: Second")
        chat.enter("/adapter redd")
        chat.see("Did you mean `red`? (404, model_not_found)")
        chat.enter("/retri")
        chat.see("there is no command /retri; did you mean /retry?")
        chat.enter("/set temperature 9")
        chat.see("temperature 9")
        chat.enter("Third")
        chat.see("(in `temperature`). (400)")
        chat.enter("/set temperature -")
        chat.enter("/adapter red@1")
        chat.see("red@1>")
        chat.enter("/retry")
        chat.see("red@1 · 10 tokens")
        chat.enter("/stats")
        chat.see("tokens/s  first text, s")
        chat.enter(f"/save {file}")
        chat.see("saved 1 conversation")
        chat.enter("/quit")
        assert chat.ended() == 0
    (row,) = map(json.loads, file.read_text().splitlines())
    assert [message["content"] for message in row["messages"]] == [
        *("Be brief.", "First", "It is so.", "Third", "It is so."),
    ]
    ((conversation, form, unused),) = read_conversations(file)
    assert (form, unused, len(conversation.turns)) == ("chat", {"adapter"}, 5)


def test_a_file_is_gone_on_with(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    turns = [("user", "First"), ("assistant", "It is so."), ("user", "Second")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "adapter": "red"}
    file.write_text(json.dumps(row) + "\n")
    with start("--set", said("Yes."), columns=250) as chat:  # a path and what is said of it, on one line
        chat.enter(f"/load {file.parent}/none")
        chat.see("cannot be read: No such file")
        chat.enter(f"/load {file}")
        chat.see("its last message has no answer: /retry asks for one")
        chat.enter("/retry")
        chat.see("red@1 · 5 tokens")
        chat.see("prompt 60, ")
        chat.enter(f"/save {file}")
        chat.see("saved 1 conversation")
        chat.type("\x04")
        assert chat.ended() == 0
    assert [message["content"] for message in json.loads(file.read_text())["messages"]][-2:] == ["Second", "Yes."]


def test_side_by_side(start: Start, served: Live) -> None:
    words = ("--set", "temperature=0", "--set", "max_tokens=20", "--set", "ignore_eos=true", "--plain")
    with start("--adapter", "red", "--adapter", "team/blue@1", *words, columns=120) as chat:
        chat.see("red, team/blue@1>")
        chat.enter("Hello")
        lines = chat.see("team/blue@1 · 20 tokens").splitlines()
        assert any(line.startswith("red@1 · 20 tokens") and "team/blue@1 · 20" in line for line in lines)
        assert any(line.startswith("red  ") and line.endswith("team/blue@1") for line in lines)
        chat.resize(60, 30)
        chat.enter("/retry")
        chat.see("\nteam/blue@1 · 20 tokens")
        chat.enter("/base")
        chat.see("\ntiny>")


def test_ctrl_c_stops_the_answer_and_keeps_what_came(start: Start, served: Live) -> None:
    with start("--set", "ignore_eos=true", "--set", "temperature=0", lines=12) as chat:
        chat.enter("Hello")
        chat.see("tokens, ")
        assert not served.idle()
        chat.type("typed ahead\x03")
        chat.see("· stopped")
        wait_for(served.idle)  # the server knows that nobody listens
        text = chat.see("tiny> typed ahead")
        assert text.index("stopped") < text.index("typed ahead")
        chat.type("\x03")  # clears the line
        chat.enter("/undo")
        chat.see("removed: Hello")  # so it was kept
        chat.type("\x03")
        assert chat.ended() == 130


def test_a_model_cannot_steer_the_terminal(start: Start) -> None:
    with start("--set", said(HOSTILE)) as chat:
        chat.enter("Hello")
        chat.see("␛]0;owned␇␛[2Jgone \ufffdturned <b>bold</b>␍hidden")
        chat.see("cached")
        assert b"\x1b]0;owned" not in chat.raw
        assert b"\x1b[2J" not in chat.raw


MARKDOWN = "# Paris\n\nA **city**\nof light\n\n- Seine\n- Louvre\n\n```python\nprint(1)\n```\n\nEnd"


def test_markdown_grows_block_by_block(start: Start) -> None:
    with start("--set", said(MARKDOWN), columns=40, lines=10) as chat:
        chat.enter("Hello")
        chat.see("cached")
        lines = [line.strip() for line in chat.text().splitlines()]
        first = lines.index("Paris")
        shown = [line for line in lines[first:] if line][:7]
        assert shown == ["Paris", "A city", "of light", "• Seine", "• Louvre", "print(1)", "End"]
        assert lines.count("Paris") == 1  # what scrolled out of the window was not drawn twice
        chat.enter("/plain")
        chat.see("as they are written")
        chat.enter("/retry")
        chat.see("# Paris\n\nA **city**\nof light\n\n- Seine")


def test_lines_and_history(start: Start, tmp_path: Path) -> None:
    with start("--set", said("Yes.")) as chat:
        chat.type("\x1b[200~pasted one\npasted two\x1b[201~")
        chat.see("pasted two")
        chat.type("\x1b\rafter Alt-Enter\\\rafter a backslash\r")
        chat.see("prompt 74, ")
        assert chat.text().count("cached") == 1
        chat.type("/adap")
        chat.see("/adapter  who answers")
        chat.type("\t")
        chat.see("> /adapter")
        chat.type(" team")
        chat.see("team/blue@1")
        chat.type("\t\r\r")  # the first Enter closes the menu
        chat.see("team/blue>")
        chat.type("\x04")
        assert chat.ended() == 0
    kept = tmp_path / "state" / "manylora" / "chat-history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    with start() as chat:
        chat.type("\x1b[A\x1b[A")
        chat.see("after a backslash")


def test_a_signal_leaves_the_terminal_as_it_was(start: Start) -> None:
    with start("--set", "ignore_eos=true") as chat:
        chat.enter("Hello")
        chat.see("tokens, ")
        chat.process.send_signal(signal.SIGTERM)
        assert chat.ended() == 130
        flags: Any = chat.settings[3]
        assert flags & termios.ECHO
        assert flags & termios.ICANON
        assert chat.raw.rfind(b"\x1b[?25h") > chat.raw.rfind(b"\x1b[?25l")  # the cursor is shown
