"""``manylora chat`` with one question, against a real server: the plain answer, and errors of one line."""

import io
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from manylora import main
from tests.api.live import Live, chat_text

HOSTILE = "\x1b]0;owned\x07\x1b[2J plain \u202etext"


def url(live: Live) -> str:
    return str(live.http.base_url)


def said(text: str) -> str:
    """Return the setting that makes the model write a text."""
    return "structured_outputs=" + json.dumps({"choice": [text]})


@pytest.fixture
def ask(served: Live, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``manylora chat``; return its status and what it printed."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["chat", "--url", url(served), *words])
        return status, *capsys.readouterr()

    return run


def test_a_question_prints_the_plain_answer(served: Live, ask: Callable[..., Any]) -> None:
    short = ("--set", "temperature=0", "--set", "max_tokens=12", "--set", "ignore_eos=true")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
    for name, fields in {"base": {}, "red": {"adapter": "red"}, "team/blue@1": {"adapter": "team/blue@1"}}.items():
        wanted = chat_text(served, system, user, **fields)
        assert ask("Hello", "--adapter", name, "--system", "Be brief.", *short) == (0, f"{wanted}\n", "")


def test_a_mix_answers(served: Live, ask: Callable[..., Any]) -> None:
    mix = [{"name": "red", "weight": 0.5}, {"name": "team/blue", "weight": -2}]
    wanted = chat_text(served, {"role": "user", "content": "Hello"}, adapter=mix)
    words = ("--set", "temperature=0", "--set", "max_tokens=12", "--set", "ignore_eos=true")
    assert ask("Hello", "--adapter", "red=0.5+team/blue=-2", *words) == (0, f"{wanted}\n", "")


def test_the_question_may_come_from_the_standard_input(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode())))
    assert ask("--set", said("as asked")) == (0, "as asked\n", "")
    for question, wrong in ((b"\xff", "the question is not UTF-8 (byte 0)"), (b" \n", "the question is empty")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question)))
        assert ask() == (2, "", f"manylora: {wrong}\n")


def test_several_answers_are_named(ask: Callable[..., Any]) -> None:
    status, out, err = ask("Hi", "--adapter", "red", "--adapter", "base", "--set", said("yes"))
    assert (status, out, err) == (0, "== red ==\nyes\n== base ==\nyes\n", "")


def test_a_file_gets_the_answer_as_it_is_and_a_terminal_no_control_character(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask("Hi", "--set", said(HOSTILE))[1] == f"{HOSTILE}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = ask("Hi", "--set", said(HOSTILE))[1]
    assert shown == "␛]0;owned␇␛[2J plain \ufffdtext\n"


@pytest.mark.parametrize(
    ("words", "status", "wanted"),
    [
        (("--adapter", "redd"), 1, r"The model `redd` does not exist. Did you mean `red`\? \(404, model_not_found\)"),
        (("--adapter", "red@7"), 1, r".*`red@7` does not exist.*\(404, model_not_found\)"),
        (("--adapter", "red=x"), 2, r"'red=x' is not NAME, NAME@VERSION, .*"),
        (("--adapter", "no such"), 2, r".*cannot name an adapter.*"),
        (("--set", "temperature=9"), 1, r".*`temperature`.*\(400\)"),
        (("--set", "temprature=1"), 2, r"there is no setting 'temprature'; did you mean temperature\?"),
        (("--set", "top_p"), 2, r"'top_p' is not NAME=VALUE.*"),
        (("--set", "top_p=high"), 2, r"top_p: 'high' is no value for it .*"),
        (("--url", "http://127.0.0.1:1"), 1, r"no answer from http://127.0.0.1:1: the connection was refused.*"),
        (("--url", "nowhere"), 2, r".*is not an address.*"),
        ((*("--adapter", "red") * 7,), 2, r"at most 6 answer at the same time \(got 7\)"),
    ],
)
def test_errors_are_one_line(ask: Callable[..., Any], words: tuple[str, ...], status: int, wanted: str) -> None:
    found, out, err = ask("Hello", *words)
    assert (found, out) == (status, "")
    assert re.fullmatch(f"manylora: {wanted}\n", err), err


def test_keys(served: Live, ask: Callable[..., Any], key: Callable[..., str]) -> None:
    infer, metrics, slow = key("infer"), key("metrics"), key("infer", requests_per_minute=1)
    words = ("Hi", "--set", "max_tokens=1")
    assert ask(*words, "--api-key", infer)[0] == 0
    status, out, err = ask(*words, "--api-key", "wrong")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"manylora: .*\(401, invalid_api_key\)\n", err)
    assert "(403, insufficient_permissions)" in ask(*words, "--api-key", metrics)[2]
    assert ask(*words, "--api-key", slow)[0] == 0
    status, out, err = ask(*words, "--api-key", slow)
    assert status == 1
    assert re.fullmatch(r"manylora: .*\(429, rate_limit_exceeded\); try again in \d+ s\n", err)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bases.extras.find_spec", lambda name: None)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["chat"]) == 1
    assert capsys.readouterr().err == (
        "manylora: chat needs packages that are not installed (prompt_toolkit); install them with: "
        'pip install "manylora[chat]"\n'
    )
