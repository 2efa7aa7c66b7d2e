"""A client that leaves frees everything, whatever its request is doing: streamed or not, with one choice or several."""

import asyncio
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.access.key import ANONYMOUS
from server.api.generation.adapters import LeasedAdapters
from server.api.generation.decoder import TextOptions
from server.api.generation.generation import Generation
from server.api.routes import completions
from server.engine.event_router import EventRouter
from server.engine.sequence import SamplingParams, Sequence
from tests.api.live import Live, enduring_model, running, tiny_service, wait_for
from tests.numeric.drive import Drive, settings
from tests.tiny import save_adapter, tiny_model

LONG = {"prompt": "Once", "max_tokens": 15_000, "temperature": 0, "ignore_eos": True}
PROMPT = "x" * 12_000
"""A prompt of many steps."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Few tokens a step, room for four sequences, and for one adapter."""
    root = tmp_path_factory.mktemp("disconnects")
    lora: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    adapters = {
        name: save_adapter(enduring_model(), root / name, seed=n, **lora) for n, name in enumerate(("red", "green"))
    }
    few = {"max_batch_sequences": 4, "max_batch_tokens": 32, "max_device_adapters": 1, "max_wait_seconds": 3600}
    with running(tiny_service(root, enduring_model(), adapter=adapters, **few)) as live:
        yield live


@contextmanager
def connected(live: Live, body: Mapping[str, Any]) -> Iterator[None]:
    """Send a request, and leave when the block ends."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0)) as client:
        client.sendall(head.encode() + content)
        yield


def check_all_free(live: Live) -> None:
    """Wait until nothing is held; assert that no adapter is leased."""
    wait_for(live.idle)
    assert live.service.engine.slots.leases(live.service.registry.version("red").content) == 0
    live.service.engine.check()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [1, 3])
class TestDisconnect:
    """In each state of a request."""

    def test_while_it_decodes(self, server: Live, stream: bool, choices: int) -> None:
        before = server.sampled()
        with connected(server, {**LONG, "adapter": "red", "n": choices, "stream": stream}):
            wait_for(lambda: server.sampled() > before + 30)
            assert server.service.engine.stats().running == choices
        check_all_free(server)
        assert server.sampled() - before < 15_000 * choices / 2

    def test_while_its_prompt_is_computed(self, server: Live, stream: bool, choices: int) -> None:
        before = server.sampled()
        with connected(server, {**LONG, "prompt": PROMPT, "max_tokens": 9, "n": choices, "stream": stream}):
            wait_for(lambda: server.service.engine.stats().running)
        check_all_free(server)
        assert server.sampled() == before

    def test_while_it_waits_for_its_turn(self, server: Live, stream: bool, choices: int) -> None:
        with connected(server, {**LONG, "n": 4}):
            wait_for(lambda: server.service.engine.stats().running == 4)
            with connected(server, {**LONG, "n": choices, "stream": stream}):
                wait_for(lambda: server.service.engine.stats().waiting == choices)
            wait_for(lambda: server.service.engine.stats().waiting == 0)
            assert server.service.engine.stats().running == 4
        check_all_free(server)

    def test_while_it_waits_for_its_adapter(self, server: Live, stream: bool, choices: int) -> None:
        with connected(server, {**LONG, "adapter": "red"}):
            wait_for(lambda: server.service.engine.stats().running == 1)
            with connected(server, {**LONG, "adapter": "green", "n": choices, "stream": stream}):
                wait_for(lambda: server.service.engine.stats().waiting == choices)
            wait_for(lambda: server.service.engine.stats().waiting == 0)
        check_all_free(server)

    def test_after_one_choice_has_ended(self, server: Live, stream: bool, choices: int) -> None:
        body = {**LONG, "prompt": ["Once"] * choices, "temperature": 1.5, "seed": 1, "stop": "Q", "stream": stream}
        before = server.sampled()
        with connected(server, {**body, "max_tokens": 3000}):
            wait_for(lambda: server.sampled() > before + 5)
        check_all_free(server)


def test_an_answer_that_cannot_be_written_frees_everything(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no format")

    with monkeypatch.context() as fault:
        fault.setattr(completions, "CompletionFormat", broken)
        assert server.http.post("/v1/completions", json={**LONG, "adapter": "red", "n": 3}).status_code == 500
    check_all_free(server)


@pytest.mark.parametrize("steps", range(6))
def test_a_closed_generation_is_gone_after_one_step(shared: Live, tmp_path: Path, steps: int) -> None:
    """While it waits, while its prompts are computed, and while it decodes."""
    drive = Drive(tiny_model(), {}, settings(tmp_path, max_batch_tokens=16))
    registry = shared.service.registry
    sequences = [Sequence(f"s{n}", list(range(30)), SamplingParams(max_tokens=60)) for n in range(3)]

    async def begin_and_close() -> None:
        generation = Generation(
            sequences,
            LeasedAdapters(registry, (), ()),
            TextOptions(),
            key=ANONYMOUS,
            meter=shared.service.usage.open(ANONYMOUS),
            prompts=1,
            codec=shared.service.codec,
            engine=drive.engine,
            event_router=EventRouter(),
            metrics=shared.service.metrics,
        )
        for _ in range(steps):
            drive.engine.step()
        generation.close()

    asyncio.run(begin_and_close())
    drive.engine.step()
    drive.engine.check()
    drive.check_empty()
