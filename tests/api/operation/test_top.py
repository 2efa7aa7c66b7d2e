"""``manylora top`` against a real server."""

import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from manylora import main
from tests.api.live import Live, running, tiny_service, wait_for
from tests.api.terminal import command


def test_one_frame(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    live.complete(adapter="red")
    assert main(["top", "--once", "--interval", "0.1", "--url", str(live.http.base_url)]) == 0
    out = capsys.readouterr().out
    assert str(live.http.base_url).rstrip("/") in out
    for shown in ("requests", "running", "KV blocks", "slots", "host cache", "first text", "end to end"):
        assert shown in out, out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--url", "http://127.0.0.1:1", "--once"), 1, "the connection was refused"),
        (("--url", "nowhere"), 2, "is not an address"),
        (("--sort", "size"), 2, "'size' is none of requests, tokens, latency, name"),
    ],
)
def test_errors_are_one_line(
    words: tuple[str, ...], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", *words]) == status
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_keys_sort_and_quit(live: Live) -> None:
    """On a terminal: it redraws at once for a key or a new size, until `q`, and leaves the terminal as it was."""
    live.complete(adapter="red")
    with command("top", "--url", str(live.http.base_url), "--interval", "600", columns=120, lines=40) as terminal:
        terminal.see("req/s ▼")
        assert "…" not in terminal.screen()
        terminal.resize(60, 30)
        wait_for(lambda: "…" in terminal.screen() and "req/s ▼" in terminal.screen())
        terminal.type("n")
        wait_for(lambda: "req/s ▼" not in terminal.screen() and " req/s" in terminal.screen())
        terminal.type("q")
        assert terminal.ended() == 0
        assert terminal.settings[3] & termios.ECHO


def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    """A proxy in front of it answers with 502 meanwhile. Other refusals end it."""
    with running(tiny_service(tmp_path)) as live, proxy(live) as front:
        words = ("top", "--url", front.url, "--interval", "0.1")
        with command(*words, columns=120, lines=40) as terminal:
            terminal.see("end to end")
            front.status = 502
            terminal.see("was refused without a reason (502)")
            front.status = None
            wait_for(lambda: "(502)" not in terminal.screen())
            front.status = 403
            assert terminal.ended() == 1
            assert "was refused without a reason (403)" in terminal.text()


@dataclass
class Proxy:
    """A proxy for GET, which answers with ``status`` itself if that is set."""

    url: str = ""
    status: int | None = None


@contextmanager
def proxy(live: Live) -> Iterator[Proxy]:
    front = Proxy()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = None if front.status else live.http.get(self.path)
            self.send_response(front.status or 200)
            self.end_headers()
            self.wfile.write(b"" if answer is None else answer.content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    front.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield front
    finally:
        server.shutdown()
        server.server_close()
