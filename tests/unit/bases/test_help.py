"""``--help`` of every command: in words a user knows."""

import re

import pytest

import manylora

COMMANDS = [
    [],
    ["serve"],
    ["doctor"],
    ["adapters"],
    ["adapters", "push"],
    ["adapters", "activate"],
    ["adapters", "alias"],
    ["adapters", "alias", "set"],
    ["keys"],
    ["keys", "add"],
    ["keys", "rotate"],
    ["chat"],
    ["top"],
    ["train"],
    ["export"],
    ["bench"],
    ["bench", "compare"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_python_types(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert manylora.main([*words, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--help" in printed
    assert not re.search(r"<\w+( \w+)?>|x>=", printed)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_80_columns_show_every_option_in_full(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert manylora.main([*words, "--help"]) == 0
    assert "\u2026" not in capsys.readouterr().out
