"""Requests and servers that end early."""

import asyncio
import dataclasses
import json
import shlex
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters.errors import AdapterNameError
from bases.base import make_base
from bases.errors import ConfigError
from server.api.http.middleware import AccessLogMiddleware, ErrorMiddleware
from server.api.serve import startup_message
from server.api.startup import open_service
from server.api.telemetry.request_log import RequestLog
from server.listener import bind
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, enduring_model, events, request, running, tiny_service, wait_for
from tests.tiny import save_adapter, tiny_tokenizer

LONG = {"max_tokens": 15_000}
"""A request that takes the enduring model seconds."""


@pytest.fixture(scope="module")
def slow_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow") / "red"
    return save_adapter(enduring_model(), folder, seed=0, r=2, target_modules=["q_proj"])


@pytest.fixture
def slow(slow_adapter: Path, tmp_path: Path) -> Iterator[Live]:
    """A server with one place in the batch and one in the queue."""
    service = tiny_service(
        tmp_path,
        enduring_model(),
        adapter={"red": slow_adapter},
        max_queue=1,
        max_batch_sequences=1,
        max_device_adapters=2,
        drain_seconds=120,
    )
    with running(service) as live:
        yield live


def begin(live: Live, stack: ExitStack, **fields: Any) -> Iterator[str]:
    """Start a long stream; return its lines after the first one arrived. ``stack`` closes it."""
    body = request(**{**LONG, **fields}, stream=True)
    lines = stack.enter_context(live.http.stream("POST", "/v1/completions", json=body)).iter_lines()
    stack.callback(lambda: lines)  # httpx closes the connection with the last reference
    next(lines)
    return lines


def test_disconnect_during_a_stream_frees_everything(slow: Live) -> None:
    with ExitStack() as stack:
        begin(slow, stack, adapter="red")
        assert slow.service.engine.stats().running == 1
    wait_for(slow.idle)
    assert slow.sampled() < LONG["max_tokens"] / 2, "it ran on"
    assert_leases_are_back(slow)


def test_disconnect_before_a_whole_response_frees_everything(slow: Live) -> None:
    with unanswered(slow, request(**LONG, adapter="red")):
        wait_for(lambda: slow.sampled() > 10)
    wait_for(slow.idle)
    assert slow.sampled() < LONG["max_tokens"] / 2, "it ran on"
    assert_leases_are_back(slow)


def test_disconnect_removes_a_queued_request(slow: Live) -> None:
    with ExitStack() as stack:
        begin(slow, stack)
        with unanswered(slow, request()):
            wait_for(lambda: slow.service.engine.stats().waiting == 1)
        wait_for(lambda: slow.service.engine.stats().waiting == 0)
        assert slow.service.engine.stats().running == 1


@contextmanager
def unanswered(live: Live, body: Mapping[str, Any]) -> Iterator[None]:
    """Send a request and leave without its answer when the block ends."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}"
    with socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + content)
        yield


def assert_leases_are_back(live: Live) -> None:
    """An adapter's bytes are deleted with its name only if no request leases it."""
    content = live.content("red")
    live.http.delete("/v1/adapters/red").raise_for_status()
    assert not content.exists()


def test_leases_are_released_after_every_kind_of_end(slow: Live) -> None:
    ends: list[tuple[int, dict[str, Any]]] = [
        (200, {}),
        (200, {"stream": True}),
        (200, {"stop": "e"}),
        (400, {"prompt": ""}),
        (400, {"max_tokens": 10**9}),
        (400, {"model": "red", "adapter": [{"name": "red"}, {"name": "red2"}]}),
        (404, {"adapter": [{"name": "red"}, {"name": "red2"}]}),
    ]
    for status, fields in ends:
        response = slow.http.post("/v1/completions", json=request(**{"adapter": "red", **fields}))
        assert response.status_code == status, response.text
    wait_for(slow.idle)
    assert_leases_are_back(slow)


def test_full_queue_is_429_and_releases_leases(slow: Live) -> None:
    with ExitStack() as stack:
        begin(slow, stack)
        stack.enter_context(unanswered(slow, request()))
        wait_for(lambda: slow.service.engine.stats().waiting == 1)
        response = slow.http.post("/v1/completions", json=request(adapter="red", stream=True))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
    wait_for(slow.idle)
    assert_leases_are_back(slow)


def test_a_mix_that_can_never_fit_the_device(slow: Live, slow_adapter: Path, tmp_path: Path) -> None:
    for name in ("green", "blue"):
        folder = save_adapter(enduring_model(), tmp_path / name, seed=len(name), r=2, target_modules=["v_proj"])
        slow.service.registry.register_folder(name, folder)
    mix = [{"name": name} for name in ("red", "green", "blue")]
    response = slow.http.post("/v1/completions", json=request(adapter=mix))
    assert "do not fit the device" in refused(slow, response, 400, "adapter")["message"]
    assert_leases_are_back(slow)


def test_draining_finishes_open_requests_and_refuses_new_ones(slow: Live) -> None:
    with ExitStack() as stack:
        lines = begin(slow, stack, max_tokens=2000)
        assert slow.http.get("/readyz").status_code == 200
        slow.server.drain()
        ready = slow.http.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert slow.http.get("/livez").status_code == 200
        for path, body in (("/v1/completions", request()), ("/v1/adapters", {"name": "x", "path": "y"})):
            refusal = slow.http.post(path, json=body)
            assert refusal.status_code == 503
            assert refusal.headers["retry-after"] == "5"
            assert refusal.json()["error"]["code"] == "draining"
        assert list(lines)[-2] == "data: [DONE]"
    wait_for(lambda: not slow.thread.is_alive())


def test_stream_cut_off_by_the_drain_timeout_ends_with_an_error(tmp_path: Path) -> None:
    service = tiny_service(tmp_path, enduring_model(), drain_seconds=0)
    with running(service) as live:
        with ExitStack() as stack:
            lines = begin(live, stack)
            live.server.drain()
            last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
        assert last["error"]["message"] == "The server is shutting down."
        wait_for(lambda: not live.thread.is_alive())


def test_a_whole_answer_that_has_not_ended_in_time_is_503(tmp_path: Path) -> None:
    service = tiny_service(tmp_path, enduring_model(), drain_seconds=0)
    with running(service) as live, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(live.http.post, "/v1/completions", json=request(**LONG))
        wait_for(lambda: live.sampled() > 0)
        live.server.drain()
        answer = waiting.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_data_folder_that_cannot_be_created_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--data-dir: .* cannot be written"):
        tiny_service(tmp_path, data_dir=tmp_path / "file")


def test_two_servers_do_not_share_a_folder(live: Live) -> None:
    with pytest.raises(ConfigError, match="--data-dir: another server"):
        open_service(make_base(enduring_model(), tiny_tokenizer(), "other"), live.service.settings)


@pytest.mark.parametrize(("name", "reason"), [("red", "adapter_config.json"), ("tiny", "base model's name")])
def test_a_bad_adapter_stops_the_start(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--adapter: {name}=.*{reason}"):
        tiny_service(tmp_path, adapter={name: tmp_path})


def test_a_port_in_use_stops_the_start(live: Live) -> None:
    with pytest.raises(ConfigError, match="--port: cannot listen"):
        bind("127.0.0.1", live.http.base_url.port or 0)
    with pytest.raises(ConfigError, match="--host"):
        bind("no such host", 0)


def test_welcome_shows_a_reachable_address(live: Live) -> None:
    with bind("0.0.0.0", 0) as anywhere:
        port = anywhere.getsockname()[1]
        assert f" http://127.0.0.1:{port}/v1/chat/completions " in startup_message(live.service, anywhere)


def test_welcome_quotes_for_the_shell(live: Live) -> None:
    base = dataclasses.replace(live.service.base, name="it's $HOME")
    with bind("127.0.0.1", 0) as anywhere:
        curl = startup_message(dataclasses.replace(live.service, base=base), anywhere).splitlines()[-1]
    assert json.loads(shlex.split(curl)[-1])["model"] == "it's $HOME"


def test_unexpected_error_is_a_500_with_an_error_object(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @app.get("/")
    async def _broken() -> None:
        raise AdapterNameError("boom")

    app.add_middleware(ErrorMiddleware)
    app.add_middleware(AccessLogMiddleware, metrics=live.service.metrics, request_log=RequestLog(), tracing=None)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/")

    response = asyncio.run(ask())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "boom" not in response.text
    assert response.headers["x-request-id"] in caplog.text


def test_a_client_that_reads_slowly_gets_everything(slow: Live) -> None:
    """What the socket's buffers cannot hold waits for the client without blocking the engine."""
    with ExitStack() as stack:
        body = request(max_tokens=3000, stream=True)
        response = stack.enter_context(slow.http.stream("POST", "/v1/completions", json=body))
        wait_for(lambda: slow.sampled() >= 3000)
        assert len(events(response)) > 100
