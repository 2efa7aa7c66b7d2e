"""kill -9 at each step of a change: after a restart acknowledged changes exist, and none is partial."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapter_folders import CONFIG, WEIGHTS
from tests.api.live import PATIENCE, request
from tests.tiny import save_adapter, tiny_model

ROOT = Path(__file__).parents[3]
Change = Callable[[httpx.Client], httpx.Response]


class Zygote:
    """See :mod:`tests.api.zygote`."""

    pid: int
    """The process id of the server started last."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.api.zygote"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    @contextmanager
    def server(self, root: Path, at: int = 0) -> Iterator[httpx.Client]:
        """Start a server on ``root``; kill it at the end if it is still alive."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{at} {root}\n")
        self._process.stdin.flush()
        words: list[str] = []
        while words[:1] != ["zygote"]:
            line = self._process.stdout.readline()
            assert line, "the zygote has died"
            words = line.split()
        self.pid, port = map(int, words[1:])
        pid = self.pid
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
                yield client
        finally:
            _kill(pid)

    def close(self) -> None:
        """Kill the process."""
        self._process.communicate()


def _kill(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
    except ProcessLookupError:
        return
    raise AssertionError("the server does not die")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, model = tmp_path_factory.mktemp("folders"), tiny_model()
    return [
        save_adapter(model, root / str(seed), seed=seed, r=2, target_modules=["q_proj", "v_proj"]) for seed in range(3)
    ]


def upload(client: httpx.Client, name: str, folder: Path) -> httpx.Response:
    with (folder / CONFIG).open("rb") as config, (folder / WEIGHTS).open("rb") as weights:
        files = [("file", (CONFIG, config)), ("file", (WEIGHTS, weights))]
        return client.post("/v1/adapters", data={"name": name}, files=files)


def state(client: httpx.Client) -> dict[str, Any]:
    """Return adapters and aliases as a client sees them, and the answer of each adapter."""
    cards = client.get("/v1/adapters").json()["data"]
    seen: dict[str, Any] = {
        card["id"]: (card["active"], card["versions"], card["content"], card["pinned"]) for card in cards
    }
    for alias in client.get("/v1/aliases").json()["data"]:
        seen[alias["id"]] = alias["targets"]
    for name in list(seen):
        answer = client.post("/v1/completions", json=request(adapter=name))
        assert answer.status_code == 200, answer.text
        seen[f"{name} says"] = answer.json()["choices"][0]["text"]
    return seen


def contents(client: httpx.Client) -> set[str]:
    """Return the contents of all versions."""
    cards = client.get("/v1/adapters").json()["data"]
    return {
        client.get(f"/v1/adapters/{card['id']}@{number}").json()["content"]
        for card in cards
        for number in card["versions"]
    }


def stored(root: Path) -> set[str]:
    return {path.name for path in (root / "data" / "adapters").iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    "kind",
    [
        "first",
        pytest.param("next", marks=pytest.mark.slow),
        pytest.param("delete", marks=pytest.mark.slow),
        pytest.param("activate", marks=pytest.mark.slow),
        pytest.param("alias", marks=pytest.mark.slow),
    ],
)
def test_killed_at_each_step(kind: str, zygote: Zygote, folders: list[Path], tmp_path: Path) -> None:
    changes: dict[str, Change] = {
        "first": lambda client: upload(client, "fresh", folders[2]),
        "next": lambda client: upload(client, "legal", folders[2]),
        "delete": lambda client: client.delete("/v1/adapters/german"),
        "activate": lambda client: client.post("/v1/adapters/legal/activate", json={"version": 1}),
        "alias": lambda client: client.put(
            "/v1/aliases/prod",
            json={"targets": [{"adapter": "legal@1", "weight": 1}]},
        ),
    }
    change = changes[kind]
    seed = tmp_path / "seed"
    with zygote.server(seed) as client:
        for name, folder in (("legal", folders[0]), ("legal", folders[1]), ("german", folders[2])):
            assert upload(client, name, folder).status_code == 201
        before = state(client)
    with zygote.server(copy(seed, tmp_path / "whole")) as client:
        assert change(client).is_success
        after = state(client)
    assert after != before
    outcomes = []
    for at in itertools.count(1):
        root = copy(seed, tmp_path / "run")
        acknowledged, survived = killed(zygote, root, at, change)
        with zygote.server(root) as client:
            found = state(client)
            assert found in (before, after), f"step {at}: neither as before nor as after"
            assert not acknowledged or found == after, f"step {at}: lost what was acknowledged"
            assert stored(root) == contents(client), f"step {at}: orphans"
        outcomes.append(found == after)
        if survived:
            break
    assert outcomes.count(False) > 3, "it was never killed before the change was made"
    assert outcomes.count(True) > 1, "it was never killed after the change was made"


def copy(seed: Path, root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(seed, root)
    return root


def killed(zygote: Zygote, root: Path, at: int, change: Change) -> tuple[bool, bool]:
    """Make a change on a server that dies at step ``at``; return whether it acknowledged the change, and survived."""
    with zygote.server(root, at) as client:
        try:
            acknowledged = change(client).is_success
            time.sleep(0.1)  # cleanup continues after the response
        except httpx.TransportError:
            return False, False
        try:
            return acknowledged, client.get("/livez").is_success
        except httpx.TransportError:
            return acknowledged, False
