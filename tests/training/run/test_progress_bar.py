"""Progress: lines in a log file, a bar on a terminal."""

import os
import pty
import select
import sys

import pytest

from training import progress_bar as progress_bar


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first, the last, and at most one every ten seconds."""
    now = 100.0
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now)
    monkeypatch.setenv("FORCE_COLOR", "1")
    said: list[str] = []
    with progress_bar.progress_bar("writing", 25_000_000, said.append, in_bytes=True) as advance:
        for _ in range(25):
            now += 1
            advance(1_000_000)
    sent = ("0 bytes", "10.0 MB", "20.0 MB", "25.0 MB")
    assert said == [f"writing: {amount} of 25.0 MB" for amount in sent]
    assert capfd.readouterr() == ("", ""), "nothing but what is said"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    said, drawn = list[str](), b""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar.progress_bar("writing", 2, said.append) as advance:
            advance(2)
        terminal.flush()
        # One read may return only the beginning of what was written.
        while b"2/2" not in drawn and select.select([screen], [], [], 10)[0]:
            drawn += screen.read(65536)
    assert b"2/2" in drawn
    assert said == []
