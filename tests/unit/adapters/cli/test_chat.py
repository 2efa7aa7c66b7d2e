"""``manylora chat``: what typed lines, names, settings and files mean, and what a terminal is sent."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from adapters.cli.chat.answer import Answer
from adapters.cli.chat.chat_file import belong_together, load, save
from adapters.cli.chat.conversation import Conversation, Turn, with_speakers
from adapters.cli.chat.dialogue import Dialogue
from adapters.cli.chat.history import LARGEST, history_path, open_history
from adapters.cli.chat.line import COMMANDS, Command, Message, read_line
from adapters.cli.chat.markdown import MarkdownFormat
from adapters.cli.chat.safe_text import encodable, visible
from adapters.cli.chat.sampling import parse_setting
from adapters.cli.chat.speaker import BadInput, Speaker, parse_speaker
from adapters.errors import AdapterNameError, UnknownAdapter


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("", None),
        (" \n", None),
        ("Hello\nthere ", Message("Hello\nthere")),
        ("/help", Command("help", "")),
        ("/exit ", Command("quit", "")),
        ("/?", Command("help", "")),
        ("/set  top_p 0.5", Command("set", "top_p 0.5")),
        ("/system Be brief.\nBe kind.", Command("system", "Be brief.\nBe kind.")),
        (" /help", Message("/help")),
        ("/etc/passwd is what?", Message("/etc/passwd is what?")),
        ("// a comment", Message("// a comment")),
        ("/* another */", Message("/* another */")),
    ],
)
def test_lines(typed: str, meant: Message | Command | None) -> None:
    assert read_line(typed) == meant


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("/adaptor red", "no command /adaptor; did you mean /adapter?"),
        ("/xyzzy", "no command /xyzzy; /help lists"),
        ("/undo twice", "/undo takes nothing after it"),
    ],
)
def test_bad_commands(typed: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason.replace("?", r"\?")):
        read_line(typed)


def test_speakers() -> None:
    assert parse_speaker("legal@2").fields() == {"adapter": "legal@2"}
    assert parse_speaker("hf://org/a+b=1").fields() == {"adapter": "hf://org/a+b=1"}
    assert Speaker("base").fields() == {"adapter": []}
    mix = [{"name": "legal", "weight": 0.7}, {"name": "team/blue", "weight": -0.5}]
    assert parse_speaker("legal=0.7+team/blue=-0.5").fields() == {"adapter": mix}
    assert parse_speaker("legal=0.5").fields() == {"adapter": [{"name": "legal", "weight": 0.5}]}
    for bad in ("legal=", "legal=nan", "=1", "legal+"):
        with pytest.raises(BadInput, match="is not NAME"):
            parse_speaker(bad)
    with pytest.raises(AdapterNameError):
        parse_speaker("../x")
    with pytest.raises(UnknownAdapter):
        parse_speaker("legal@0")


def test_settings() -> None:
    assert parse_setting("temperature=0.2") == ("temperature", 0.2)
    assert parse_setting("stop=END") == ("stop", "END")
    assert parse_setting('stop=["a", "b"]') == ("stop", ["a", "b"])
    assert parse_setting("reasoning_effort=low") == ("reasoning_effort", "low")
    for bad in ("temperature", "temprature=1", "top_p=high", "top_p=NaN", "seed=null", 'seed="1"'):
        with pytest.raises(BadInput):
            parse_setting(bad)


def test_what_a_terminal_is_sent() -> None:
    assert visible("a\tb\r\nc\x1b[2J\x9b\x7f\u202e\u2028\ud800") == "a\tb\nc␛[2J\ufffd␡\ufffd\n\ufffd"
    family = "naïve 日本 👩\u200d👧"  # a joiner belongs to a picture
    assert visible(family) == encodable(family) == family
    assert encodable("a\udcffb") == "a?b"


def test_blocks_settle() -> None:
    form = MarkdownFormat()
    for text, settled in {
        "one": "",
        "one\n\n": "",
        "one\n\ntwo": "one\n\n",
        "- a\n\n- b": "",
        "- a\n\nend": "- a\n\n",
        "```\na\n\nb": "",
        "```\na\n```\n# T": "```\na\n```\n",
        "| a |\n|---|\n| 1 |": "",
    }.items():
        assert text[: form.settled(text)] == settled, text


@pytest.mark.parametrize("opening", ["> ", ">", "- ", "1. ", "- > "])
def test_deeply_nested_blocks_are_shown(opening: str) -> None:
    for depth in (1, 5, 9, 10, 11, 18, 19, 20, 21, 25, 300):
        assert "innermost" in _shown(opening * depth + "innermost"), depth


def test_a_line_of_openings_is_shown() -> None:
    assert _shown(">" * 3000).count(">") == 3000
    assert "- - -" in _shown("- " * 2000 + "-x")


def _shown(text: str) -> str:
    written = StringIO()
    Console(file=written, width=200).print(MarkdownFormat().render(text))
    return written.getvalue()


def turns(*prompts: str) -> list[Turn]:
    return [Turn(number, prompt, prompt.upper()) for number, prompt in enumerate(prompts, 1)]


def test_a_new_speaker_goes_on_with_the_first_conversation() -> None:
    red, blue = Conversation(Speaker("red"), turns("a", "b")), Conversation(Speaker("blue"), turns("x"))
    green, again = with_speakers([red, blue], [Speaker("green"), Speaker("blue")])
    assert (green.turns, again) == (red.turns, blue)
    green.turns.append(Turn(3, "c", "C"))
    assert len(red.turns) == 2
    said = green.messages("Be brief.", "b?", before=2)
    assert [message["content"] for message in said] == ["Be brief.", "a", "A", "b?"]


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    with pytest.raises(BadInput, match="nothing to save"):
        save(file, [Conversation(Speaker("red"))], None, replace=False)
    both = [Conversation(Speaker(name), turns("a", "b")) for name in ("red", "blue")]
    assert save(file, both, "Be brief.", replace=False) == 2
    with pytest.raises(BadInput, match="exists, and is not of this chat"):
        save(file, both, None, replace=False)
    chats = load(file)
    assert [(chat.adapter, chat.system, list(chat.turns)) for chat in chats] == [
        (each.speaker.label, "Be brief.", each.turns) for each in both
    ]
    assert belong_together(chats)
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "chat.jsonl:1 is not JSON"),
        ('{"prompt": "a"}', "chat.jsonl:1 has no messages"),
        ('{"messages": [{"role": "user"}]}', "messages.0 has no role and content"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "must take turns"),
        ("", "has no rows"),
    ],
)
def test_bad_files(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(row)
    with pytest.raises(BadInput, match=reason):
        load(file)


def test_counts_of_an_answer() -> None:
    times = iter([0.0, 1.0, 3.0])
    answer = Answer(clock=lambda: next(times))
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    applied = [{"name": "legal@2", "alias": "prod", "weight": 1.0}]
    for text in ("a", "b"):
        answer.take({"adapter": applied, "usage": usage, "choices": [{"delta": {"content": text}}]})
    assert answer.summary("tiny") == "prod → legal@2 · 5 tokens, 2.0/s · first text 1.00 s · prompt 9, 4 cached"
    answer.take({"choices": [{"delta": {}, "finish_reason": "length"}]})
    assert answer.summary("tiny").endswith(" · cut off at its limit of tokens")


def test_a_large_history_loses_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_path()
    path.parent.mkdir()
    entry = "\n# 2026-11-30 12:00:00\n+" + "x" * 1000 + "\n"
    path.write_text(entry * (LARGEST // len(entry) + 10))
    path.chmod(0o644)
    assert open_history()[1] is None
    kept = path.read_text()
    assert kept == entry * (len(kept) // len(entry))
    assert 0 < len(kept) < LARGEST
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert open_history()[1] == "what you type is not kept after this session: Not a directory"


def test_every_command_is_done() -> None:
    assert Dialogue(None, None).commands.keys() == COMMANDS.keys() - {"quit"}
