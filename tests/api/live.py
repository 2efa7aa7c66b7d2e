"""A real server on a real port, over a tiny random model: uvicorn in a thread, the engine in its own."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bases.base import make_base
from server.api.serve import DrainingServer, bind
from server.api.service import Service
from server.api.startup import open_service
from server.config import Settings
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

PATIENCE = 60.0
"""Seconds after which a test stops waiting and fails."""
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "red": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "green": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "team/blue": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj", "down_proj"]},
}
"""Name -> ``LoraConfig`` arguments."""


@dataclass(frozen=True)
class Live:
    """A running server: its objects, and an HTTP client of it."""

    service: Service
    server: DrainingServer
    thread: threading.Thread
    http: httpx.Client

    def complete(self, **fields: Any) -> dict[str, Any]:
        """Return a greedy completion of 12 tokens; ``fields`` override those of the request."""
        response = self.http.post("/v1/completions", json=request(**fields))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, **fields: Any) -> str:
        """Return the text of :meth:`complete`."""
        text: str = self.complete(**fields)["choices"][0]["text"]
        return text

    def stream(self, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
        """Return the events of a stream; assert that it ends with ``[DONE]``."""
        with self.http.stream("POST", path, json={**fields, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            return events(response)

    def idle(self) -> bool:
        """Return whether no request holds any resource."""
        stats = self.service.engine.stats()
        return not (stats.running or stats.waiting or stats.blocks_used or len(self.service.event_router))

    def sampled(self) -> int:
        """Return the number of tokens sampled since the start."""
        return self.service.engine.stats().output_tokens

    def content(self, name: str) -> Path:
        """Return the folder of the content of ``name`` in the store."""
        return self.service.store.path(self.service.registry.version(name).content)

    def registered(self) -> tuple[object, ...]:
        """Return all state that a refused change must not change: names with their revisions, and stored contents."""
        registry, root = self.service.registry, self.service.store.root
        return registry.entries(), registry.aliases(), sorted(path.name for path in root.iterdir())


def request(**fields: Any) -> dict[str, Any]:
    """Return the body of a small greedy completion."""
    return {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}


@contextmanager
def unchanged(live: Live) -> Iterator[None]:
    """Assert that the block changes nothing that is registered."""
    before = live.registered()
    yield
    assert live.registered()[:2] == before[:2]
    wait_for(lambda: live.registered() == before)  # a thread deletes the bytes a moment later


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the objects of a stream; assert that it is complete. A busy machine's stream has comments, too."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line and line[0] != ":"]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def typed_events(live: Live, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream as they come; assert that each names its type."""
    with live.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), response.read()
        blocks = [block for block in "".join(response.iter_text()).split("\n\n") if block and not block.startswith(":")]
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def chat_text(live: Live, *messages: dict[str, Any], **fields: Any) -> str:
    """Return the text of a small greedy chat, to compare what other endpoints answer with."""
    body = {"messages": list(messages), "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    response = live.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` is true; fail after :data:`PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def enduring_model() -> PreTrainedModel:
    """A random Llama that needs seconds to fill its context, so that a test finds requests still running."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16384,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config)


def tiny_service(root: Path, model: PreTrainedModel | None = None, **changes: Any) -> Service:
    """Return a service of ``model``, by default the tiny Llama; ``changes`` are fields of Settings."""
    plain = {"quantization": "none", "dtype": "fp32", "device": "cpu", "kv_memory_gib": 0.01, "threads": 1}
    settings = Settings(**{"data_dir": root / "data", **plain, **changes})
    return open_service(make_base(model or tiny_model(), tiny_tokenizer(), "tiny"), settings)


@contextmanager
def running(service: Service) -> Iterator[Live]:
    """Serve on a free port."""
    server = DrainingServer(service)
    host = service.settings.host
    listener: socket.socket = bind(host, 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    try:
        wait_for(lambda: server.started)
        with httpx.Client(base_url=url, timeout=PATIENCE) as http:
            yield Live(service, server, thread, http)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
    assert not thread.is_alive(), "the server does not end"
