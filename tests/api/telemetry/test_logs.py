"""Log lines: JSON and text, one line a record whatever is in it, and what ``--log-prompts`` adds."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.serve import LOGS_PROMPTS
from server.logs import make_formatter
from tests.api.live import Live, request, wait_for
from tests.api.telemetry.conftest import Observed

ROOT = Path(__file__).parents[3]
EVIL = "red\n2026-01-01T00:00:00Z ERROR forged\r\x1b[2J\u2028\u202e\x85 \udc80"
SERVE = """
import sys
from pathlib import Path
from bases import interrupts
from server.api.serve import DrainingServer
from server.listener import bind
from server.logs import set_up_logs
from tests.api.live import tiny_service

interrupts.exit_on_sigint()
set_up_logs("info", "auto")
with bind("127.0.0.1", 0) as listener:
    DrainingServer(tiny_service(Path(sys.argv[1]), cpu="torch")).run(sockets=[listener])
"""


def record(message: str, **extra: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "server.test", "levelname": "WARNING", "levelno": 30, "msg": message})
    made.__dict__.update(extra)
    return made


def failure(message: str) -> logging.LogRecord:
    try:
        raise ValueError(message)
    except ValueError:
        return record("it failed", exc_info=sys.exc_info())


def lines(text: str) -> list[str]:
    """Split as any reader may, not at line feeds only."""
    return text.splitlines()


def test_json_is_one_object_a_line() -> None:
    formatter = make_formatter(json_lines=True)
    (line,) = lines(formatter.format(record(EVIL, adapter=EVIL, status=200, color_message="no")))
    found = json.loads(line)
    assert list(found)[:4] == ["timestamp", "level", "logger", "event"]
    assert found.pop("timestamp").endswith("Z")
    expected = {"level": "warning", "logger": "server.test", "event": EVIL, "adapter": EVIL, "status": 200}
    assert found == expected
    (line,) = lines(formatter.format(failure(EVIL)))
    assert f"ValueError: {EVIL}" in json.loads(line)["exception"]


@pytest.mark.parametrize("colors", [False, True])
def test_text_is_one_line(colors: bool) -> None:
    formatter = make_formatter(json_lines=False, colors=colors)
    (line,) = lines(formatter.format(record(EVIL, adapter=EVIL, tags=[EVIL])))
    assert r"red\n2026-01-01T00:00:00Z ERROR forged\r\x1b[2J\u2028\u202e\x85 \udc80" in line
    assert "warning" in line
    assert "server.test" in line


def test_a_traceback_is_indented() -> None:
    first, *others = lines(make_formatter(json_lines=False).format(failure(EVIL)))
    assert "it failed" in first
    assert any("ValueError: red" in line for line in others)
    assert all(line.startswith("    ") for line in others)


def test_a_server_logs_json_unless_on_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        curl = next(line for line in process.stdout if line.startswith("curl "))
        url = curl.split()[1].partition("/v1")[0]
        httpx.post(f"{url}/v1/completions", json=request(), timeout=60).raise_for_status()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    found = [json.loads(line) for line in errors.splitlines()]
    (asked,) = [each for each in found if each["logger"] == "server.api.telemetry.request_log"]
    assert asked["event"].startswith("POST /v1/completions 200 in ")
    assert asked["output_tokens"] == 12


def test_prompts_are_logged_only_if_asked(observed: Observed, shared: Live, caplog: pytest.LogCaptureFixture) -> None:
    answer = observed.live.complete(prompt="Once upon a time")
    wait_for(lambda: any(hasattr(each, "prompts") for each in observed.records))
    (line,) = [each.__dict__ for each in observed.records if hasattr(each, "prompts")]
    assert line["prompts"] == ["Once upon a time"]
    assert line["answers"] == [answer["choices"][0]["text"]]
    assert "EVERY PROMPT" in LOGS_PROMPTS
    caplog.clear()
    with caplog.at_level(logging.INFO):
        shared.complete(prompt="Once upon a time")
        wait_for(lambda: any(each.name.endswith("request_log") for each in caplog.records))
    assert not any(hasattr(each, "prompts") for each in caplog.records)
