"""A draining server finishes uploads and registrations in progress, and accepts no new ones."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from server.api import serve
from tests.adapter_folders import CONFIG, WEIGHTS
from tests.api.live import PATIENCE, running, tiny_service, wait_for
from tests.api.registry.test_kill import Zygote

BOUNDARY = "b" * 20


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


def form(folder: Path, name: str) -> tuple[bytes, bytes]:
    """Return the HTTP request that uploads ``folder``, as two halves."""
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    body = f"{part}name\r\n\r\n{name}\r\n".encode()
    for file in (CONFIG, WEIGHTS):
        body += f"{part}file; filename={file}\r\n\r\n".encode() + (folder / file).read_bytes() + b"\r\n"
    body += f"--{BOUNDARY}--\r\n".encode()
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    ).encode()
    return head + body[: len(body) // 2], body[len(body) // 2 :]


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=60)


def staged(root: Path) -> list[Path]:
    return list((root / "data" / "adapters").glob(".tmp-*"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_drain_finishes_a_partly_sent_upload(zygote: Zygote, folders: Mapping[str, Path], tmp_path: Path) -> None:
    first, rest = form(folders["spare"], "late")
    with zygote.server(tmp_path) as client, connect(client) as upload:
        pid = zygote.pid
        upload.sendall(first)
        wait_for(lambda: staged(tmp_path))
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: client.get("/readyz").status_code == 503)
        refusals = [
            client.post("/v1/adapters", data={"name": "new"}, files={"file": b"x"}),
            client.post("/v1/adapters", json={"name": "new", "path": "x"}),
            client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "x"}),
        ]
        assert [refusal.status_code for refusal in refusals] == [503] * 3
        assert alive(pid)
        upload.sendall(rest)
        answer = upload.recv(1 << 16).decode()
        assert answer.startswith("HTTP/1.1 201 "), answer
        client.close()
        wait_for(lambda: not alive(pid))
    with zygote.server(tmp_path) as client:
        assert client.get("/v1/adapters/late").json()["status"] == "ready"
        assert not staged(tmp_path)


@pytest.mark.parametrize("way", ["path", "upload"])
def test_drain_finishes_a_registration_after_disconnect(
    folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """fsync is slow."""
    reached, gate, fsync = threading.Event(), threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        reached.set()
        assert gate.wait(PATIENCE)
        fsync(descriptor)

    monkeypatch.setattr(serve, "CLOSE_SECONDS", 0.1)  # the time for closing connections must not be what saves it
    with running(tiny_service(tmp_path, adapter_root=folders["spare"].parent)) as live:
        monkeypatch.setattr(os, "fsync", slow)
        body = json.dumps({"name": "left", "path": "spare"}).encode()
        head = f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        by_path = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
        with connect(live.http) as client:
            client.sendall(by_path if way == "path" else b"".join(form(folders["spare"], "left")))
            assert reached.wait(PATIENCE)
            assert live.service.in_progress == 1
        live.server.drain()
        live.thread.join(2)
        assert live.thread.is_alive()
        gate.set()
        wait_for(lambda: not live.thread.is_alive())
    monkeypatch.undo()
    with running(tiny_service(tmp_path)) as live:
        live.complete(adapter="left")


def test_drain_timeout_ends_slow_uploads(
    folders: Mapping[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = form(folders["spare"], "late")
    with running(tiny_service(tmp_path, drain_seconds=0)) as live, connect(live.http) as upload:
        upload.sendall(first)
        wait_for(lambda: staged(tmp_path))
        live.server.drain()
        wait_for(lambda: not live.thread.is_alive())
        answer = upload.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 503 "), answer
    assert b'"code":"draining"' in answer
    assert "Traceback" not in caplog.text
    with running(tiny_service(tmp_path)) as live:
        assert live.http.get("/v1/adapters").json()["data"] == []
        assert not staged(tmp_path)
