"""A web server with fixed responses, as a model hub with one repository."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """A web server with fixed responses."""

    url: str = ""
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    """Request target -> status, headers, body."""
    requests: list[tuple[str, Message]] = field(default_factory=list)

    def redirect(self, path: str, to: str) -> None:
        self.answers[path] = (302, {"location": to}, b"")

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


@contextmanager
def site() -> Iterator[Site]:
    here = Site()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.requests.append((self.path, self.headers))
            status, headers, body = here.answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        here.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield here
        server.shutdown()
        thread.join()


def use_as_hub(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make downloads from a model hub go to this server."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def publish(
    hub: Site, files: Mapping[str, bytes], *, name: str = "org/name", revision: str = "main", commit: str = COMMIT
) -> None:
    """Publish a repository's files at a commit, to which ``revision`` refers."""
    siblings = [{"rfilename": file} for file in files]
    answer = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
    hub.answers[f"/api/models/{name}/revision/{revision}"] = (200, {}, answer)
    for file, data in files.items():
        hub.answers[f"/{name}/resolve/{commit}/{file}"] = (200, {}, data)
