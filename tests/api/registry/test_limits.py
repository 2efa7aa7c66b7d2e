"""Many uploads at once, and some that never finish: other requests must not wait for them."""

import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from server.api.registry.limits import MAX_REGISTRATIONS, MAX_UPLOADS
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, running, tiny_service, wait_for

HEAD = (
    b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n"
    b"Content-Type: multipart/form-data; boundary=cut\r\n\r\n--cut\r\n"
)


def staged(live: Live) -> int:
    return len(list(live.service.store.root.glob(".tmp-*")))


def begin_upload(live: Live) -> socket.socket:
    client = socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0), timeout=20)
    client.sendall(HEAD)
    return client


def test_concurrent_uploads_are_limited(live: Live) -> None:
    form = {"data": {"name": "x"}, "files": {"file": ("a.zip", b"")}}
    with ExitStack() as open_uploads:
        for _ in range(MAX_UPLOADS):
            open_uploads.enter_context(begin_upload(live))
        wait_for(lambda: staged(live) == MAX_UPLOADS)
        response = live.http.post("/v1/adapters", **form)
        assert refused(live, response, 429, None)["code"] == "too_many_uploads"
        assert response.headers["retry-after"] == "1"
    wait_for(lambda: staged(live) == 0)
    wait_for(lambda: live.http.post("/v1/adapters", **form).status_code == 422)


def test_stalled_upload_times_out(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.registry.upload.STALL_SECONDS", 0.1)
    with begin_upload(live) as client:
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
    wait_for(lambda: staged(live) == 0)


def test_slow_upload_times_out(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.registry.upload.UPLOAD_SECONDS", 0.3)
    with begin_upload(live) as client:
        client.settimeout(0.02)
        deadline, answer = time.monotonic() + 5, b""
        while not answer and time.monotonic() < deadline:
            client.sendall(b"x")
            try:
                answer = client.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_rolling_back_does_not_wait_for_downloads(
    folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = {"red": folders["red"]}
    with (
        socket.create_server(("127.0.0.1", 0), backlog=256) as hub,  # accepts connections and never responds
        running(tiny_service(tmp_path, adapter=adapters, allow_source=("hf://org",), max_rank=16)) as live,
        httpx.Client(base_url=live.http.base_url, limits=httpx.Limits(max_connections=None), timeout=60) as others,
        ThreadPoolExecutor(60) as pool,
    ):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        body = {"name": "slow", "source": "hf://org/slow"}
        downloads = [pool.submit(others.post, "/v1/adapters", json=body) for _ in range(60)]
        wait_for(lambda: staged(live) == MAX_REGISTRATIONS)
        before = time.monotonic()
        assert live.http.post("/v1/adapters/red/activate", json={"version": 1}, timeout=10).status_code == 200
        assert live.http.get("/v1/adapters/red", timeout=10).json()["receipt"]
        assert time.monotonic() - before < 10
        hub.close()  # closes the waiting connections
        assert {download.result().status_code for download in downloads} == {400}
