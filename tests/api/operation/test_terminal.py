"""The server's output: a log line for each request, and what Ctrl-C waits for."""

import logging
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.logs import make_formatter
from tests.api.live import Live, enduring_model, request, running, tiny_service, wait_for

ROOT = Path(__file__).parents[3]
ENDURING = """
import sys
from pathlib import Path
from bases import interrupts
from server.api.serve import DrainingServer
from server.listener import bind
from tests.api.live import enduring_model, tiny_service

interrupts.exit_on_sigint()
service = tiny_service(Path(sys.argv[1]), enduring_model(), cpu="torch")
with bind("127.0.0.1", 0) as listener:
    DrainingServer(service).run(sockets=[listener])
"""
SECRET = "s3cret"


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def lines(logged: pytest.LogCaptureFixture, level: int = logging.INFO, count: int = 1) -> list[logging.LogRecord]:
    """Return the log records of requests once there are ``count``: a response may precede its line."""
    name = "server.api.telemetry.request_log"
    wait_for(lambda: sum(record.name == name and record.levelno == level for record in logged.records) >= count)
    return [record for record in logged.records if record.name == name and record.levelno >= logging.INFO]


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of a record that are not every record's."""
    plain = logging.makeLogRecord({}).__dict__.keys() | {"message"}
    return {name: value for name, value in record.__dict__.items() if name not in plain}


def test_whole_response_is_one_log_line(live: Live, logged: pytest.LogCaptureFixture) -> None:
    answer = live.complete(adapter="green", prompt="Once upon a time")
    (line,) = lines(logged)
    assert re.fullmatch(r"POST /v1/completions 200 in \d+ ms", line.getMessage())
    found = fields(line)
    spent = [found.pop(f"{name}_seconds") for name in ("queue", "load", "prefill", "decode")]
    assert 0 <= sum(spent) <= found.pop("seconds") + 0.002
    assert 0 < found.pop("first_text_seconds") < 60
    assert re.fullmatch("[0-9a-f]{32}", found.pop("request_id"))
    usage = answer["usage"]
    assert found == {
        "method": "POST",
        "path": "/v1/completions",
        "route": "/v1/completions",
        "status": 200,
        "client": "127.0.0.1",
        "answer_id": answer["id"],
        "adapter": "green@1",
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "output_tokens": 12,
        "finish": "length",
        "outcome": "ok",
    }


def test_stream_is_one_log_line(live: Live, logged: pytest.LogCaptureFixture) -> None:
    mix = [{"name": "red", "weight": 0.5}, {"name": "team/blue", "weight": 0.5}]
    live.stream(**request(adapter=mix, n=2))
    (line,) = lines(logged)
    found = fields(line)
    assert (found["adapter"], found["output_tokens"], found["finish"]) == ("red@1 + team/blue@1", 24, "length, length")


def test_embeddings_are_one_log_line(live: Live, logged: pytest.LogCaptureFixture) -> None:
    live.http.post("/v1/embeddings", json={"input": ["Once", "upon"], "model": "red"}).raise_for_status()
    (line,) = lines(logged)
    found = fields(line)
    assert (found["adapter"], found["outcome"], found["output_tokens"]) == ("red@1", "ok", 0)
    assert found["prompt_tokens"] > 0
    assert found["prefill_seconds"] > 0


def test_refusal_is_one_log_line(live: Live, logged: pytest.LogCaptureFixture) -> None:
    live.http.get("/v1/adapters/nobody", headers={"x-request-id": "mine"})
    (line,) = lines(logged)
    assert re.fullmatch(r"GET /v1/adapters/nobody 404 in \d+ ms", line.getMessage())
    found = fields(line)
    assert (found["request_id"], found["route"], found["status"]) == ("mine", "/v1/adapters/{reference}", 404)
    assert "answer_id" not in found


def test_disconnect_is_logged(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    body = request(max_tokens=16_000, stream=True)
    with running(tiny_service(tmp_path, enduring_model())) as live:
        with live.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        (line,) = lines(logged)
    assert fields(line)["outcome"] == "cancelled"
    assert "finish" not in fields(line)


def test_health_checks_are_logged_at_debug_level(live: Live, logged: pytest.LogCaptureFixture) -> None:
    for path in ("/livez", "/readyz", "/health", "/health/", "/metrics"):
        live.http.get(path)
    assert lines(logged, logging.DEBUG) == []


def test_nothing_secret_is_logged(live: Live, logged: pytest.LogCaptureFixture) -> None:
    """At any log level, by any part of the server."""
    headers = {"authorization": f"Bearer {SECRET}"}
    live.http.post("/v1/completions", params={"key": SECRET}, json=request(prompt=SECRET), headers=headers)
    live.http.post("/v1/completions", json={"prompt": SECRET, SECRET: 1}, headers=headers)
    assert len(lines(logged, count=2)) == 2
    said = [record for record in logged.records if not record.name.startswith(("httpx", "httpcore"))]
    formatter = make_formatter(json_lines=True)
    assert SECRET not in "\n".join(map(formatter.format, said))


def test_path_cannot_forge_a_log_line(live: Live, logged: pytest.LogCaptureFixture) -> None:
    live.http.get("/v1/models/x%0AINFO%20forged")
    live.http.get(f"/v1/models/{'y' * 5000}")
    first, second = (line.getMessage() for line in lines(logged, count=2))
    assert first.startswith("GET /v1/models/x%0AINFO%20forged 404 ")
    assert len(second) < 300


@contextmanager
def serving(folder: Path, requests: int) -> Iterator[subprocess.Popen[str]]:
    """Run a server in a separate process with this many long requests in progress."""
    command = [sys.executable, "-c", ENDURING, str(folder)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process, ExitStack() as stack:
        stack.callback(process.kill)
        assert process.stdout is not None
        curl = next(line for line in process.stdout if line.startswith("curl "))
        http = stack.enter_context(httpx.Client(base_url=curl.split()[1].partition("/v1")[0], timeout=60))
        for _ in range(requests):
            body = request(max_tokens=16_000, stream=True)
            stack.enter_context(http.stream("POST", "/v1/completions", json=body))
        yield process


@pytest.mark.parametrize(("requests", "said"), [(1, "1 request"), (2, "2 requests")])
def test_first_ctrl_c_drains_and_the_second_exits(tmp_path: Path, requests: int, said: str) -> None:
    with serving(tmp_path, requests) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"finishing {said}; press Ctrl-C again to stop now\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 130


def test_ctrl_c_counts_uploads(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as process, ExitStack() as stack:
        assert process.stdout is not None
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port(process)), timeout=60))
        head = "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        client.sendall(f"{head}Content-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode())
        assert client.recv(1024).startswith(b"HTTP/1.1 100 ")  # the server waits for the body
        process.send_signal(signal.SIGINT)
        told = "finishing 1 request and 1 registration; press Ctrl-C again to stop now\n"
        assert process.stdout.readline() == told


def port(process: subprocess.Popen[str]) -> int:
    """Return the server's address."""
    (found,) = [each.laddr.port for each in psutil.Process(process.pid).net_connections() if each.status == "LISTEN"]
    return int(found)


def test_sigterm_mentions_no_ctrl_c(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "finishing 1 request\n"


def test_ctrl_c_without_requests_exits_cleanly(tmp_path: Path) -> None:
    with serving(tmp_path, 0) as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
