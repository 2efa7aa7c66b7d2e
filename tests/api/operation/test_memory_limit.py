"""A process that may allocate little more than it has serves everything, in smaller steps; freed memory is returned."""

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGTERM

import psutil
import pytest

from server.api import serve
from tests.api.forks import Forks
from tests.api.live import request, running, tiny_service, wait_for

ROOM = 90 * 2**20
"""Bytes that it may still allocate: a step of 256 rows of this model takes about 250 MB."""
HOLE = 60_000
"""Bytes: less than what glibc maps by itself, and gives back at once."""


def test_all_are_served_though_a_full_step_does_not_fit(forks: Forks, tmp_path: Path) -> None:
    # Log probabilities of a prompt need all of its rows: nothing of it is taken from the prefix cache.
    bodies = [request(prompt=f"{number:03}" * 60, max_tokens=6, prompt_logprobs=0) for number in range(12)]
    settings = {"max_batch_tokens": 256, "max_model_len": 512, "speculation": "off"}
    with (
        forks.server("tests.api.operation.servers:wide", tmp_path, **settings) as server,
        ThreadPoolExecutor(len(bodies)) as pool,
    ):

        def ask(body: dict[str, object]) -> str:
            answer = server.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            text: str = answer.json()["choices"][0]["text"]
            return text

        free = list(pool.map(ask, bodies))  # together, so that the threads of the process exist
        size = psutil.Process(server.pid).memory_info().vms
        resource.prlimit(server.pid, resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        short = list(pool.map(ask, bodies))
        assert short == free
        assert server.http.get("/readyz").status_code == 200
        server.send(SIGTERM)
        assert server.wait() == 0
    assert "Memory is short" in server.log(), "the limit was never reached"
    assert "No step succeeds" not in server.log()


def test_freed_memory_goes_back_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes between what is still used: without help, glibc keeps them as long as the process lives."""
    process = psutil.Process()
    monkeypatch.setattr(serve, "TRIM_TICKS", 5)
    kept = [b"1" * HOLE for _ in range(2000)]
    with running(tiny_service(tmp_path)):
        held = process.memory_info().rss
        del kept[::2]
        wait_for(lambda: process.memory_info().rss < held - len(kept) * HOLE // 2)
