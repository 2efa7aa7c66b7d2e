"""The runbook's backup: made of a server under load, and restored into a new one."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx
import pytest

from tests.adapter_folders import CONFIG, WEIGHTS
from tests.api.forks import Forked, Forks
from tests.api.live import PATIENCE, request
from tests.tiny import save_adapter, tiny_model

SERVER = "tests.api.operation.servers:tiny"
PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
ADAPTERS = 6


def script() -> str:
    """The Python code in the section about backups."""
    section = PAGE.read_text().partition("\n## Back up and restore\n")[2].partition("\n## ")[0]
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[str, tuple[str, bytes]]]]:
    """The files of different adapters, as a form has them."""
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    folders = [save_adapter(model, root / f"{seed}", seed=seed, r=2, target_modules=["q_proj"]) for seed in range(9)]
    return [[("file", (name, (folder / name).read_bytes())) for name in (CONFIG, WEIGHTS)] for folder in folders]


def register(server: Forked, name: str, files: list[tuple[str, tuple[str, bytes]]]) -> None:
    server.http.post("/v1/adapters", data={"name": name}, files=files).raise_for_status()


def answers(http: httpx.Client, names: list[str]) -> dict[str, str]:
    texts = {}
    for name in names:
        response = http.post("/v1/completions", json=request(model=name))
        assert response.status_code == 200, (name, response.text)
        texts[name] = response.json()["choices"][0]["text"]
    return texts


def listed(http: httpx.Client) -> list[str]:
    return [card["id"] for card in http.get("/v1/adapters", params={"limit": 100}).json()["data"]]


@contextmanager
def load(server: Forked, files: list[list[tuple[str, tuple[str, bytes]]]]) -> Iterator[list[str]]:
    """Register and remove adapters, new contents and known ones, until the block ends. Yields what was registered."""
    stop, made = threading.Event(), list[str]()

    def change() -> None:
        for number in count():
            if stop.is_set():
                return
            register(server, f"new-{number}", files[number % len(files)])
            made.append(f"new-{number}")
            if number >= 2:
                server.http.delete(f"/v1/adapters/new-{number - 2}").raise_for_status()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join(PATIENCE)


def test_a_backup_made_under_load_restores_all_that_was_acknowledged(
    forks: Forks, tmp_path: Path, files: list[list[tuple[str, tuple[str, bytes]]]]
) -> None:
    kept = [f"kept-{number}" for number in range(ADAPTERS)]
    with forks.server(SERVER, tmp_path / "old") as server:
        for number, name in enumerate(kept):
            register(server, name, files[number])
        server.http.put("/v1/aliases/prod", json={"targets": [{"adapter": kept[0]}]}).raise_for_status()
        expected = answers(server.http, [*kept, "prod"])
        assert len(set(expected.values())) > 1
        with load(server, files) as made:
            for again in range(3):
                before = len(made)
                command = [sys.executable, "-c", script(), tmp_path / "old" / "data", tmp_path / f"copy-{again}"]
                subprocess.run(command, check=True, timeout=PATIENCE)
                assert len(made) > before, "nothing was registered meanwhile"
    for again in range(3):
        restored = tmp_path / f"restored-{again}"
        restored.mkdir()
        (tmp_path / f"copy-{again}").rename(restored / "data")
        with forks.server(SERVER, restored) as server:
            names = listed(server.http)
            assert set(kept) <= set(names)
            assert answers(server.http, [*kept, "prod"]) == expected
            lost = [name for name in names if name not in kept and not served(server, name)]
            assert len(lost) <= 3, "only what was removed while it was copied may lack its bytes"
            register(server, "after", files[8])
            assert answers(server.http, ["after"])


def served(server: Forked, name: str) -> bool:
    """Whether an adapter answers; one whose bytes are missing says so."""
    response = server.http.post("/v1/completions", json=request(model=name))
    assert response.status_code == 200 or "missing" in response.text, response.text
    return response.status_code == 200
