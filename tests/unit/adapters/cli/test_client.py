"""What the client does where the other end is no manylora, is not there, or leaves; and what it never sends.

What it asks of a server is tested against one, in ``tests/api/registry/test_commands.py``.
"""

import os
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from adapters.cli.client import AdapterClient, ServerRefused, ServerUnreachable
from adapters.errors import AdapterError, AdapterNameError, AdapterRejected, UnknownAdapter
from adapters.registry.snapshot import Target

NOWHERE = "http://127.0.0.1:9"
"""Nothing listens at the discard port."""
EMPTY_LIST = b'{"object": "list", "data": [], "has_more": false, "refused": [], "store": {}}'


@dataclass
class Peer:
    """A server that sends the next of ``answers`` to each request; for None it closes the connection."""

    answers: list[tuple[int, dict[str, str], bytes] | None]
    reads: bool = True
    """Whether it reads a request's body before it responds."""
    asked: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    received: int = 0
    beginning: bytes = b""
    url: str = ""

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        self.asked.append(f"{request.command} {request.path}")
        self.keys.append(request.headers["authorization"])
        left = int(request.headers.get("content-length", 0)) if self.reads else 0
        while left and (chunk := request.rfile.read(min(left, 1 << 16))):
            left -= len(chunk)
            self.received += len(chunk)
            self.beginning = (self.beginning + chunk)[:4096]
        answer = self.answers.pop(0)
        if answer is not None:
            status, headers, body = answer
            request.send_response(status)
            for name, value in headers.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(body)


@pytest.fixture
def listen() -> Iterator[Callable[[Peer], Peer]]:
    """Start a peer on a free port; stop it after the test."""
    servers = []

    def start(peer: Peer) -> Peer:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        for method in ("GET", "POST", "PUT", "DELETE"):
            setattr(Handler, f"do_{method}", lambda request: peer.serve(request))
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # clients disconnect in these tests
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        servers.append(server)
        peer.url = f"http://127.0.0.1:{server.server_port}"
        return peer

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files named as an adapter's; the weights are 32 MiB of zeros."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    os.truncate(tmp_path / "adapter_model.safetensors", 32 << 20)
    (tmp_path / "README.md").write_text("shown")
    (tmp_path / "notes.txt").write_text("not sent")
    return tmp_path


def refusal(status: int, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, body


def test_refused_connection_names_the_address() -> None:
    with (
        AdapterClient(NOWHERE) as client,
        pytest.raises(ServerUnreachable) as caught,
    ):
        client.list()
    why = "the connection was refused, so no server runs there; start one with `manylora serve`, or check the address"
    assert str(caught.value) == f"no answer from {NOWHERE}: {why}"


def test_each_connection_error_has_its_own_message(
    listen: Callable[[Peer], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(url: str, ask: Callable[[AdapterClient], object]) -> str:
        with AdapterClient(url, timeout=5) as client, pytest.raises(ServerUnreachable) as caught:
            ask(client)
        return str(caught.value).removeprefix(f"no answer from {url}: ")

    def list_all(client: AdapterClient) -> object:
        return client.list()

    plain = listen(Peer([None] * 9))
    looking = told(plain.url, list_all)
    assert looking.startswith("it closed the connection before its answer was complete")
    assert looking.endswith("; try again later")
    changing = told(plain.url, lambda client: client.pin("legal", True))
    assert changing.endswith("the change may have been made: check before you try again")
    with socket.create_server(("127.0.0.1", 0)) as garbled:
        threading.Thread(target=_speak, args=(garbled,), daemon=True).start()
        https = f"https://127.0.0.1:{garbled.getsockname()[1]}"
        assert told(https, list_all) == "it does not speak HTTPS; try the address with http://"
    monkeypatch.setattr(socket, "getaddrinfo", _unknown)
    assert told("http://manylora.invalid", list_all) == "the host manylora.invalid is not known here; check the address"


def _speak(listener: socket.socket) -> None:
    """As an HTTP server answers a TLS handshake."""
    client, _ = listener.accept()
    with client:
        client.recv(1024)
        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def _unknown(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_silent_server_times_out(listen: Callable[[Peer], Peer]) -> None:
    gate = threading.Event()

    class Silent(Peer):
        def serve(self, request: BaseHTTPRequestHandler) -> None:
            gate.wait(10)

    with AdapterClient(listen(Silent([])).url, timeout=0.05) as client:
        with pytest.raises(ServerUnreachable, match=r": it sent nothing for 0\.05 s, so it is busy or hangs; try"):
            client.list()
        gate.set()


def test_dropped_get_is_retried_once(listen: Callable[[Peer], Peer]) -> None:
    peer = listen(Peer([None, (200, {}, EMPTY_LIST), None, None, None]))
    with AdapterClient(peer.url) as client:
        assert client.list().adapters == []
        with pytest.raises(ServerUnreachable):
            client.list()
    assert len(peer.asked) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda client, folder: client.push(folder, "legal"),
        lambda client, folder: client.activate("legal", 1),
        lambda client, folder: client.remove("legal@1"),
        lambda client, folder: client.put_alias("prod", [Target("legal", 1, 1.0)]),
    ],
    ids=["push", "activate", "remove", "alias"],
)
def test_change_is_never_retried(
    listen: Callable[[Peer], Peer], folder: Path, change: Callable[[AdapterClient, Path], object]
) -> None:
    """It may have taken effect before the connection dropped."""
    peer = listen(Peer([None, None]))
    with AdapterClient(peer.url) as client, pytest.raises(ServerUnreachable):
        change(client, folder)
    assert len(peer.asked) == 1


def test_an_upload_is_streamed_and_counted(listen: Callable[[Peer], Peer], folder: Path) -> None:
    total = (32 << 20) + len("{}") + len("shown")
    peer = listen(Peer([(201, {}, b'{"id": "legal", "object": "adapter", "version": 7}')]))
    calls: list[tuple[int, int]] = []
    with AdapterClient(peer.url) as client:
        tracemalloc.start()
        try:
            pushed = client.push(folder, "legal", pinned=False, progress=lambda *call: calls.append(call))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8 << 20, "it was held in memory"
    assert (pushed.version, pushed.new) == (7, True)
    assert total < peer.received < total + 4096
    assert [sent for sent, _ in calls] == sorted(sent for sent, _ in calls)
    assert {of for _, of in calls} == {total}
    assert calls[-1][0] == total
    assert b"not sent" not in peer.beginning
    assert b'{"files": ["notes.txt"], "count": 1, "adapters": []}' in peer.beginning
    order = [b'name="name"', b'name="pinned"', b'name="left_out"', b'filename="adapter_config.json"', b".safetensors"]
    places = [peer.beginning.index(part) for part in order]
    assert places == sorted(places), "the server must know the fields before the files come"


def test_older_server_gets_no_left_out_field(listen: Callable[[Peer], Peer], folder: Path) -> None:
    """It refuses an unknown field without registering anything."""
    os.truncate(folder / "adapter_model.safetensors", 10)
    body = b'{"error": {"message": "Unknown field.", "param": "left_out", "code": "unknown_parameter"}}'
    peer = listen(Peer([refusal(400, body), (201, {}, b'{"id": "legal", "object": "adapter", "version": 7}')]))
    with AdapterClient(peer.url) as client:
        assert client.push(folder, "legal").version == 7
    assert [peer.beginning.count(part) for part in (b'name="left_out"', b'name="name"')] == [1, 2]
    other = listen(Peer([refusal(400, body.replace(b"left_out", b"preload"))]))
    with AdapterClient(other.url) as client, pytest.raises(ServerRefused, match=r"^Unknown field\.$"):
        client.push(folder, "legal")


def test_the_same_content_is_not_new(listen: Callable[[Peer], Peer], folder: Path) -> None:
    peer = listen(Peer([(200, {}, b'{"id": "legal", "object": "adapter", "version": 1}')]))
    with AdapterClient(peer.url) as client:
        assert not client.push(folder, "legal").new


def test_refusal_during_an_upload_is_reported(listen: Callable[[Peer], Peer], folder: Path) -> None:
    """A server may respond before it has read the whole upload."""
    os.truncate(folder / "adapter_model.safetensors", 1 << 20)

    class Early(Peer):
        def serve(self, request: BaseHTTPRequestHandler) -> None:
            super().serve(request)
            request.wfile.flush()
            while request.rfile.read1(1 << 16):  # like uvicorn, which reads on before it closes
                pass

    body = b'{"error": {"message": "too large", "type": "x", "param": null, "code": "store_full"}}'
    peer = listen(Early([(507, {"content-length": str(len(body)), "connection": "close"}, body)], reads=False))
    with AdapterClient(peer.url) as client, pytest.raises(ServerRefused, match=r"^too large$") as refused:
        client.push(folder, "legal")
    assert (refused.value.status, refused.value.code) == (507, "store_full")


@pytest.mark.parametrize("size", [16 << 20, 33 << 20])
def test_file_that_changes_during_upload_is_an_error(listen: Callable[[Peer], Peer], folder: Path, size: int) -> None:
    weights = folder / "adapter_model.safetensors"
    peer = listen(Peer([refusal(400)]))
    with (
        AdapterClient(peer.url) as client,
        pytest.raises(AdapterRejected, match="changed while it was read") as refused,
    ):
        client.push(folder, "legal", progress=lambda *_: os.truncate(weights, size))
    assert refused.value.file == weights.name


def test_a_folder_without_an_adapter_is_refused_before_anything_is_sent(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with AdapterClient(NOWHERE) as client, pytest.raises(AdapterRejected, match="is a pickle"):
        client.push(folder, "legal")


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda client: client.remove("../aliases/prod"), AdapterNameError),
        (lambda client: client.remove("legal/../other"), AdapterNameError),
        (lambda client: client.remove("legal?x"), AdapterNameError),
        (lambda client: client.remove(""), AdapterNameError),
        (lambda client: client.remove("legal@"), UnknownAdapter),
        (lambda client: client.show("legal@0"), UnknownAdapter),
        (lambda client: client.remove_alias("../adapters/legal"), AdapterNameError),
        (lambda client: client.push(Path(), "a,b"), AdapterNameError),
    ],
)
def test_invalid_names_are_refused_without_a_request(
    ask: Callable[[AdapterClient], object], error: type[AdapterError]
) -> None:
    """``..`` would lead to another resource."""
    with AdapterClient(NOWHERE) as client, pytest.raises(error):
        ask(client)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "localhost", "ftp://x", "http://", "http://x:port"])
def test_invalid_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        AdapterClient(url)


def test_key_is_sent_with_every_request_and_never_printed(listen: Callable[[Peer], Peer]) -> None:
    peer = listen(Peer([(200, {}, EMPTY_LIST)]))
    with AdapterClient(peer.url, api_key="sesame") as client:
        client.list()
    assert peer.keys == ["Bearer sesame"]
    for key in ("ses\name", "sesamé"):
        with pytest.raises(ValueError, match="header") as refused:
            AdapterClient(peer.url, api_key=key)
        assert "ses" not in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (refusal(200, b"<html>welcome</html>"), "is answered by something that is no manylora"),
        (refusal(200, b"[]"), "is answered by something that is no manylora"),
        (refusal(200, b'{"status": "ok"}'), "is answered by something that is no manylora"),
        (refusal(502, b"<html>bad gateway</html>"), "was refused without a reason"),
        (refusal(404, b'{"error": "no"}'), "was refused without a reason"),
        (refusal(307, location="https://elsewhere/v1/adapters"), "has moved to https://elsewhere/v1/adapters"),
    ],
)
def test_responses_of_other_servers(
    listen: Callable[[Peer], Peer], answer: tuple[int, dict[str, str], bytes], said: str
) -> None:
    """Messages contain the address without its password."""
    peer = listen(Peer([answer]))
    with AdapterClient(peer.url.replace("//", "//user:secret@")) as client, pytest.raises(ServerRefused) as refused:
        client.show("legal")
    assert (refused.value.status, refused.value.code) == (answer[0], None)
    assert f"{peer.url}/v1/adapters/legal {said}" in str(refused.value)
    assert "secret" not in str(refused.value)
