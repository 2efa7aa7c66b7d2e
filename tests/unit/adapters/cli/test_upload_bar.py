"""Progress of an upload: lines in a log file, a bar on a terminal that can draw one."""

import os
import pty

import pytest
from rich.console import Console

from adapters.cli import upload_bar


def test_log_file_gets_a_line_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(upload_bar.time, "monotonic", lambda: now)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with upload_bar.upload_bar("legal [v2]") as advance:
        for sent in range(0, 25_000_001, 1_000_000):
            advance(sent, 25_000_000)
            now += 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "uploading legal [v2]: 10.0 MB of 25.0 MB",
        "uploading legal [v2]: 20.0 MB of 25.0 MB",
        "uploading legal [v2]: all of it; the server checks it",
    ]


def test_quick_upload_prints_no_progress(capfd: pytest.CaptureFixture[str]) -> None:
    with upload_bar.upload_bar("legal") as advance:
        advance(1, 2)
        advance(2, 2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("term", "bar"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_dumb_terminal_gets_lines(term: str, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "w") as terminal:
        assert upload_bar.draws_bars(Console(file=terminal)) == bar
