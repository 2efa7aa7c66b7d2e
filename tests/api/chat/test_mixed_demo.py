"""Chats of every kind for eight adapters in one batch of the demo model: each equals its solo run to the bit."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.compute.cpu.decoder import Decoder
from tests.adapter_folders import DEMO_LAYOUT, write_adapter
from tests.api.live import Live, wait_for

pytestmark = pytest.mark.demo

NAMES = [f"mixed-{number}" for number in range(7)]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]},
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0},
    "structured": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
        "temperature": 1,
    },
    "tool": {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1},
    "logprobs": {"temperature": 0.7, "top_p": 0.9},
    "three choices": {"n": 3, "temperature": 1},
}


@pytest.fixture
def adapters(demo: Live, tmp_path: Path) -> Iterator[list[str]]:
    """Names of eight adapters."""
    for seed, name in enumerate(NAMES, start=1):
        folder = write_adapter(tmp_path / name, DEMO_LAYOUT, seed=seed, lora_alpha=0.5)
        files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
        demo.http.post("/v1/adapters", data={"name": name}, files=files).raise_for_status()
    yield ["red", *NAMES]
    for name in NAMES:
        demo.http.delete(f"/v1/adapters/{name}").raise_for_status()
    wait_for(demo.idle)


def test_every_kind_in_one_batch_equals_its_solo_run(demo: Live, adapters: list[str]) -> None:
    runner = demo.service.engine.runner
    if not isinstance(runner.forward, Decoder):
        pytest.skip("needs the C kernels, hence a compiler")

    def answer(wanted: tuple[int, str, str]) -> list[Any]:
        number, adapter, kind = wanted
        body = {
            "model": adapter,
            "messages": [{"role": "user", "content": f"Tell me about city number {number}, please."}],
            "max_tokens": 12,
            "seed": number,
            "logprobs": True,
            "top_logprobs": 3,
            "return_token_ids": True,
            **KINDS[kind],
        }
        response = demo.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return [(choice["token_ids"], choice["logprobs"]) for choice in response.json()["choices"]]

    wanted = [(number, adapter, kind) for number, adapter in enumerate(adapters) for kind in KINDS]
    with ThreadPoolExecutor(len(wanted)) as clients:
        together = list(clients.map(answer, wanted))
    assert together == [answer(each) for each in wanted]
