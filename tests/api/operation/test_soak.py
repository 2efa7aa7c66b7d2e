"""``python -m loadtests.soak`` and ``loadtests.streams``, each for some seconds, against a small server."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import loadtests.soak.soak as soak_module
from loadtests import streams
from loadtests.soak.__main__ import main
from loadtests.soak.bad_requests import KINDS, RANDOM_KINDS, REFUSALS
from tests.api.live import Live, enduring_model, running, tiny_service

CLIENTS = ("--clients", "5", "--seed", "1590")
"""With this seed, the first things that the clients do are of five kinds: see test_soak_finds_nothing."""
BRIEF = (*CLIENTS, "--contents", "3", "--ranks", "2,4", "--answer-tokens", "6", "--sample-seconds", "0.2")


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with fewer places for adapters than a soak has."""
    root = tmp_path_factory.mktemp("soaked")
    small = {"max_device_adapters": 2, "host_cache_gib": 1e-4, "max_rank": 8, "max_queue": 16, "max_batch_sequences": 4}
    with running(tiny_service(root, enduring_model(), **small)) as live:
        yield live


def soak(live: Live, folder: Path, *words: str) -> tuple[int, dict[str, object]]:
    """Run a soak of ``live``; return its exit status and record."""
    config, file = folder / "config.json", folder / "soak.json"
    config.write_text(live.service.base.model.config.to_json_string())
    where = ("--url", str(live.http.base_url), "--pid", str(os.getpid()), "--config", str(config), "--json", str(file))
    status = main([*BRIEF, *where, *words])
    return status, json.loads(file.read_text())


def test_soak_finds_nothing(
    soaked: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_module, "PAGE", 2)  # it has more adapters to remove
    plot = tmp_path / "memory.svg"
    status, found = soak(soaked, tmp_path, "--minutes", "0.08", "--memory-growth-mib", "4096", "--plot", str(plot))
    said = capsys.readouterr()
    assert status == 0, said.out
    assert "nothing was violated" in said.out
    assert (found["violations"], found["reasons"]) == (0, [])
    outcomes = found["outcomes"]
    assert isinstance(outcomes, dict)
    for kind in ("whole", "stream", "register", "bad request", "leaving", "again, alone"):
        assert outcomes.get(kind), outcomes
    assert isinstance(found["compared"], int)
    assert found["compared"] > 10
    assert "resident memory" in plot.read_text()
    assert soaked.service.registry.entries() == []


def test_every_bad_request_is_refused(soaked: Live) -> None:
    """Otherwise a soak that happens to send it would fail."""
    wrong = []
    for bad in (*KINDS, *(kind(random.Random(0)) for kind in RANDOM_KINDS)):
        method, path, content = bad
        response = soaked.http.request(method, path, **content)
        if response.status_code not in REFUSALS:
            wrong.append((response.status_code, str(bad)[:200], response.text[:200]))
    assert wrong == []


def test_soak_fails_if_memory_grows(soaked: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here it was to shrink by 4 GiB."""
    words = ("--minutes", "0.05", "--memory-growth-mib", "-4096", "--warm-up", "0")
    status, found = soak(soaked, tmp_path, *words)
    assert (status, found["violations"]) == (1, 1)
    assert "VIOLATED 1 times:\n  memory grew by" in capsys.readouterr().out


def test_streams_are_complete_or_refused(soaked: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "streams.json"
    words = ["--url", str(soaked.http.base_url), "--count", "120", "--output-tokens", "4", "--json", str(file)]
    assert streams.main(words) == 0, capsys.readouterr().out
    outcomes = json.loads(file.read_text())["outcomes"]
    assert set(outcomes) <= {"complete", "refused"}
    assert outcomes["refused"] > 0, "the queue holds 16"
    assert sum(outcomes.values()) == 120


def test_streams_of_an_unknown_adapter_fail(soaked: Live, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--url", str(soaked.http.base_url), "--count", "3", "--adapters", "nobody"]
    assert streams.main(words) == 1
    assert "status 404" in capsys.readouterr().out
