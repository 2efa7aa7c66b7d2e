"""``--help`` of every command: in words a user knows."""

import pytest

import manylora

COMMANDS = [
    [],
    ["serve"],
    ["doctor"],
    ["adapters"],
    ["adapters", "push"],
    ["adapters", "alias"],
    ["train"],
    ["export"],
    ["bench"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_flags_have_no_type(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert manylora.main([*words, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--help" in printed
    assert "<bool>" not in printed
