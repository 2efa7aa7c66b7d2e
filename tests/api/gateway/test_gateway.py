"""The gateway in front of one application, in this process: without Ray, but over HTTP."""

import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from server.api.app import create_app
from server.api.service import Service
from server.ray.exchange import Call, Calls, Feed
from server.ray.gateway import FULL, NO_METRICS, AllFull, Gateway, ReplicaLost
from tests.api.live import enduring_model, events, request, tiny_service, wait_for
from tests.tiny import save_adapter


class OneReplica:
    """The way to one replica, in this process."""

    def __init__(self, app: FastAPI) -> None:
        self.calls: list[Call] = []
        self.fed = 0
        self.refreshed = 0
        self.lost = False
        self.feeding_fails: Exception | None = None
        self._running = Calls(app, "here")

    async def call(self, call: Call) -> AsyncIterator[list[Message]]:
        self.calls.append(call)
        if self.lost:
            raise ReplicaLost
        async for messages in self._running.run(call):
            yield messages

    async def feed(self, feed: Feed) -> None:
        assert feed.replica == "here"
        if self.feeding_fails is not None:
            raise self.feeding_fails
        self.fed += 1
        await self._running.feed(feed)

    async def everywhere(self, call: Call) -> dict[str, list[Message]]:
        if self.lost:
            return {}
        return {"here": await self._running.whole(call), "there": await self._running.whole(call)}

    async def refresh(self) -> None:
        self.refreshed += 1


class Running:
    """A gateway that serves."""

    def __init__(self, service: Service) -> None:
        app = create_app(service)
        self.service = service
        self.replica = OneReplica(app)
        self.named: list[tuple[Sequence[str], str | None]] = []
        self._gateway = Gateway(self.replica, self.contents, self.refresh, max_body=2**18, body_seconds=30)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._app if scope["type"] == "lifespan" else self._gateway)(scope, receive, send)

    def contents(self, names: Sequence[str], user: str | None) -> tuple[str, ...]:
        self.named.append((names, user))
        return tuple(f"content of {name}" for name in names)

    async def refresh(self) -> None:
        self.replica.refreshed += 1


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, httpx.Client]]:
    root = tmp_path_factory.mktemp("gateway")
    red = save_adapter(enduring_model(), root / "red", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    changes: Mapping[str, object] = {"adapter": {"red": red}, "max_model_len": 8192, "max_body_mib": 0.25}
    running = Running(tiny_service(root, enduring_model(), kv_memory_gib=0.05, **changes))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(running, log_config=None, http="h11", loop="asyncio", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_for(lambda: server.started)
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as http:
        yield running, http
    server.should_exit = True
    thread.join()
    listener.close()


Pair = tuple[Running, httpx.Client]


def test_an_answer_and_a_stream_pass(running: Pair) -> None:
    gateway, http = running
    answer = http.post("/v1/completions", json=request(model="red", user="ada", temperature=0))
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert gateway.named[-1] == (("red",), "ada")
    assert gateway.replica.calls[-1].contents == ("content of red",)
    with http.stream("POST", "/v1/completions", json=request(model="red", stream=True, temperature=0)) as stream:
        pieces = [event["choices"][0]["text"] for event in events(stream)]
    assert len(pieces) > 1  # tokens that come while a busy machine sends make one piece
    assert "".join(pieces) == answer.json()["choices"][0]["text"]
    assert "".join(pieces) == answer.json()["choices"][0]["text"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_request(running: Pair, stream: bool) -> None:
    gateway, http = running
    engine, body = gateway.service.engine, request(model="red", max_tokens=8000, stream=stream)
    before = engine.stats().output_tokens
    with httpx.Client(base_url=http.base_url) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.3))
    wait_for(lambda: not engine.stats().running and not len(gateway.service.event_router))
    assert 0 < engine.stats().output_tokens - before < 8000


def test_a_body_that_is_too_long_is_refused_as_without_a_gateway(running: Pair) -> None:
    gateway, http = running
    fed = gateway.replica.fed
    declared = http.post("/v1/completions", content=b" " * 300_000, headers={"content-type": "application/json"})
    assert (declared.status_code, gateway.replica.calls[-1].body) == (413, None)
    chunked = http.post("/v1/completions", content=iter([b" " * 100_000] * 3))
    assert chunked.status_code == 413
    assert chunked.json()["error"]["message"] == declared.json()["error"]["message"]
    assert gateway.replica.fed > fed, "the replica asked for it, and stopped"


def test_an_upload_is_fed_and_answered_when_all_know_of_it(running: Pair, tmp_path: Path) -> None:
    gateway, http = running
    folder = save_adapter(enduring_model(), tmp_path, 2, r=4, lora_alpha=8, target_modules=["q_proj"])
    paths = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
    before = gateway.replica.refreshed
    refused = http.post("/v1/adapters", data={"name": "blue"}, files=[("file", (paths[0].name, paths[0].read_bytes()))])
    assert refused.status_code == 422
    assert gateway.replica.refreshed == before, "nothing has changed"
    files = [("file", (path.name, path.read_bytes())) for path in paths]
    assert http.post("/v1/adapters", data={"name": "blue"}, files=files).status_code == 201
    assert gateway.replica.refreshed == before + 2, "the replicas, and the gateway's own names"
    assert gateway.replica.calls[-1].body is None
    assert http.get("/v1/adapters/blue").json()["active"] == 1
    assert gateway.named[-1] == (("blue",), None)
    assert http.delete("/v1/adapters/blue").is_success
    assert gateway.replica.refreshed == before + 4


def test_metrics_are_of_all_replicas(running: Pair) -> None:
    _, http = running
    page = http.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert page.headers["content-type"].startswith("text/plain")
    for replica in ("here", "there"):
        assert f'manylora_adapter_loads_total{{replica="{replica}"}}' in page.text
    assert http.head("/metrics").headers["content-length"]


def test_a_lost_replica_is_a_503_in_the_format_of_the_route(running: Pair) -> None:
    gateway, http = running
    gateway.replica.lost = True
    try:
        for path, kind in (("/v1/completions", "server_error"), ("/v1/messages", "api_error")):
            answer = http.post(path, json={})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["type"] in (kind, "overloaded_error")
        refused = http.get("/metrics")
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, NO_METRICS)
    finally:
        gateway.replica.lost = False


@pytest.mark.parametrize("failure", [AllFull(), RuntimeError("unforeseen")], ids=["full", "other"])
def test_a_body_that_cannot_be_fed_is_an_error_of_the_server(
    running: Pair, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    gateway, http = running
    gateway.replica.feeding_fails = failure
    try:
        # A small upload: with more, the server would close before all is read, and the client might lose the answer.
        answer = http.post("/v1/adapters", data={"name": "new"}, files={"adapter_config.json": b"{}"})
    finally:
        gateway.replica.feeding_fails = None
    if isinstance(failure, AllFull):
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, FULL)
    else:
        assert answer.status_code == 500
        assert "unforeseen" in caplog.text, "the server's log says why"
    wait_for(lambda: not len(gateway.service.event_router))


def test_what_is_no_json_goes_to_any_replica_which_says_so(running: Pair) -> None:
    gateway, http = running
    assert http.post("/v1/completions", content=b"{").status_code == 400
    assert gateway.replica.calls[-1].contents == ()
