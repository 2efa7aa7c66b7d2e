"""Registers adapters with servers that are slow, of another kind or behind a path, and removes them after Ctrl-C."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from loadtests.drive import registration
from loadtests.drive.peers import PeerName
from loadtests.drive.progress import Display
from loadtests.drive.registration import AdapterRegistrar, AdapterSetup, find_peer, registered_adapters
from loadtests.errors import BadOption, BenchError
from loadtests.workload.adapters import AdapterGenerator, ModelShape

TINY = ModelShape(hidden=8, intermediate=8, layers=1, heads=1, kv_heads=1, head_dim=8)
CONFIG = """
{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
"""
PATIENCE = 60.0
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def never(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(PATIENCE)
    raise web.HTTPGatewayTimeout


async def taken(request: web.Request) -> web.StreamResponse:
    await request.read()
    return web.json_response({})


async def absent(request: web.Request) -> web.StreamResponse:
    return web.json_response({}, status=404)


async def models(request: web.Request) -> web.StreamResponse:
    return web.json_response({"data": [{"id": "tiny"}]})


async def completion(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    event = {
        "model": "tiny",
        "adapter": [{"name": asked["adapter"]}],
        "choices": [{"text": "a"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": asked["max_tokens"]},
    }
    return web.Response(text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")


@asynccontextmanager
async def served(
    register: Answer = taken, remove: Answer = taken, complete: Answer = completion, path: str = ""
) -> AsyncIterator[TestServer]:
    app = web.Application(client_max_size=2**24)
    app.router.add_get(f"{path}/v1/models", models)
    app.router.add_post(f"{path}/v1/adapters", register)
    app.router.add_delete(f"{path}/v1/adapters/{{name}}", remove)
    app.router.add_post(f"{path}/v1/completions", complete)
    async with TestServer(app) as server:
        yield server


@pytest.fixture(autouse=True)
def default_signal_handlers() -> Iterator[None]:
    """Let children receive signals: background jobs of a shell ignore SIGINT, children of nohup ignore SIGHUP."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def reporting(answer: Answer) -> tuple[asyncio.Event, Answer]:
    """Return an event that is set at the first request, and the answer that sets it."""
    asked = asyncio.Event()

    async def report(request: web.Request) -> web.StreamResponse:
        asked.set()
        return await answer(request)

    return asked, report


async def benching(server: TestServer, tmp_path: Path, *words: str) -> asyncio.subprocess.Process:
    config = tmp_path / "config.json"
    config.write_text(CONFIG)
    brief = ("--adapters", "distinct@2", "--arrivals", "closed:2", "--repeats", "1", "--requests", "2", "--ranks", "1")
    command = ("-m", "manylora", "bench", "--config", str(config), "--url", str(server.make_url("/")), *brief, *words)
    return await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Wait for a process and return its exit status and stderr."""
    _, err = await asyncio.wait_for(process.communicate(), PATIENCE / 2)
    return process.returncode, err.decode()


@pytest.mark.parametrize(
    ("status", "answer", "key", "reason"),
    [
        (
            401,
            '{"error": {"message": "No key."}}',
            None,
            "denies access (status 401: No key.): give its API key with ",
        ),
        (403, '{"detail": "Not you."}', "s3cret", "(status 403: Not you.): it does not accept this API key"),
        (
            404,
            "<html>nginx</html>",
            None,
            "this is not a manylora server: it has no /v1/models; give --url without that path",
        ),
        (502, "<html>nginx</html>", None, "the server, or a proxy in front of it, fails (/v1/models: status 502); "),
        (429, "slow down", None, "the server refused /v1/models: status 429: slow down"),
        (200, '{"data": [{"id": "tiny"}]}', None, "--base: the server has no base `big`; it has tiny"),
    ],
)
def test_an_error_response_is_described(status: int, answer: str, key: str | None, reason: str) -> None:
    async def say(request: web.Request) -> web.StreamResponse:
        return web.Response(text=answer, status=status)

    async def scenario() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", say)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/"), headers=headers) as http:
            await find_peer(http, "manylora", "big")

    with pytest.raises(BenchError, match=re.escape(reason)) as caught:
        asyncio.run(scenario())
    assert not any(secret in str(caught.value) for secret in ("s3cret", "<html>"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_every_adapter(number: signal.Signals, tmp_path: Path) -> None:
    async def scenario() -> None:
        removed = set[str]()
        asked, complete = reporting(never)

        async def remove(request: web.Request) -> web.StreamResponse:
            removed.add(request.match_info["name"])
            return web.json_response({})

        async with served(remove=remove, complete=complete) as server:
            process = await benching(server, tmp_path)
            await asyncio.wait_for(asked.wait(), PATIENCE)
            process.send_signal(number)
            status, err = await ended(process)
        assert (status, removed) == (130, {"bench-000", "bench-001"}), err
        assert "Traceback" not in err
        assert "LEFT" not in err

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_gives_up_and_names_what_is_left(number: signal.Signals, tmp_path: Path) -> None:
    async def scenario() -> None:
        asked, complete = reporting(never)
        removing, remove = reporting(never)
        async with served(remove=remove, complete=complete) as server:
            process = await benching(server, tmp_path)
            await asyncio.wait_for(asked.wait(), PATIENCE)
            process.send_signal(number)
            await asyncio.wait_for(removing.wait(), PATIENCE)
            process.send_signal(number)
            status, err = await ended(process)
        assert status == 130
        assert "LEFT ON THE SERVER: bench-000, bench-001" in err
        assert "Traceback" not in err

    asyncio.run(scenario())


def test_a_signal_during_removal_lets_it_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        removing, go = asyncio.Event(), asyncio.Event()
        removed = set[str]()

        async def remove(request: web.Request) -> web.StreamResponse:
            removing.set()
            await go.wait()
            removed.add(request.match_info["name"])
            return web.json_response({})

        async with served(remove=remove) as server:
            process = await benching(server, tmp_path)
            await asyncio.wait_for(removing.wait(), PATIENCE)
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.2)
            go.set()
            status, err = await ended(process)
        assert (status, removed) == (130, {"bench-000", "bench-001"}), err

    asyncio.run(scenario())


async def register_two(server: TestServer, display: Display) -> list[str]:
    async with aiohttp.ClientSession(server.make_url("/")) as http:
        client = AdapterRegistrar(http, "manylora", AdapterSetup(AdapterGenerator(TINY, ranks=(1,))))
        async with registered_adapters(client, set(), 2, display) as left:
            pass
    return left


def test_removing_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "END_SECONDS", 0.1)
    monkeypatch.setattr(registration, "REMOVAL_SECONDS", 0.0)

    async def scenario() -> list[str]:
        async with served(remove=never) as server:
            return await asyncio.wait_for(register_two(server, Display(Console(stderr=True))), PATIENCE / 2)

    left = asyncio.run(scenario())
    assert [line.partition(":")[0] for line in left] == ["bench-000 was not removed", "bench-001 was not removed"]
    assert "the server took more than" in left[0]


def test_a_registration_without_an_answer_may_still_happen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registration, "END_SECONDS", 0.1)

    async def scenario() -> None:
        asked, register = reporting(never)
        async with served(register=register, remove=absent) as server:
            task = asyncio.ensure_future(register_two(server, Display(Console(stderr=True))))
            await asyncio.wait_for(asked.wait(), PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, PATIENCE / 2)

    asyncio.run(scenario())
    err = capsys.readouterr().err
    assert "bench-000 was not removed: it is not there yet, but its registration had no answer" in err


def test_a_server_may_be_behind_a_path(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(path="/some/where") as server:
            url = str(server.make_url("/some/where"))
            status, err = await ended(await benching(server, tmp_path, "--url", url))
        assert status == 0, err
        assert f"{url} serves `tiny`" in err

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("peer", "answer", "reason"),
    [
        ("manylora", "[]", "this is not a manylora server: unexpected answer of /v1/models: it must be a JSON object$"),
        ("manylora", "<html>", "unexpected answer of /v1/models: it is not JSON$"),
        ("manylora", '{"data": null}', "unexpected answer of /v1/models: data must be a list$"),
        (
            "vllm",
            '{"data": [{"id": 3}]}',
            "not a vllm server: unexpected answer of /v1/models: data.0.id must be a string$",
        ),
        ("manylora", '{"data": ["tiny"]}', "unexpected answer of /v1/models: data.0 must be a JSON object$"),
        ("manylora", "[" * 100_000, "unexpected answer of /v1/models: it is not JSON$"),
        ("llamacpp", '{"data": [{"id": "tiny"}]}', "unexpected answer of /lora-adapters: it must be a list$"),
    ],
)
def test_a_server_of_another_kind_is_refused(peer: PeerName, answer: str, reason: str) -> None:
    async def say(request: web.Request) -> web.StreamResponse:
        return web.Response(text=answer)

    async def scenario() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", say)
        async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as http:
            await find_peer(http, peer, None)

    with pytest.raises(BadOption, match=reason):
        asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_that_was_started(number: signal.Signals, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    server = f"sh -c 'echo $$ > {started}.new; mv {started}.new {started}; exec sleep {PATIENCE:.0f}'"
    words = [sys.executable, "-m", "manylora", "bench", "--spawn", server, "--adapters", "base"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while not started.exists():
            assert time.monotonic() < deadline, "it never started"
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE / 2)
    assert (process.returncode, err) == (130, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
