"""New weights under one name: running requests finish with the old content, later ones use the new, none uses both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.registry.database import open_sqlite
from adapters.registry.in_memory import Lease
from adapters.registry.registry import Registry
from server.engine.sequence import SamplingParams, WeightedAdapter
from tests.numeric.drive import Drive
from tests.numeric.lab import Lab
from tests.unit.adapters.registries import FakeHooks

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = tuple(range(70, 95))
LONG, SHORT = 40, 8
OLD, NEW = (("all", 1.0),), (("rslora", 1.0),)


@pytest.fixture
def drive(llama: Lab, tmp_path: Path) -> Drive:
    return llama.drive(tmp_path)


@pytest.fixture
def registry(drive: Drive, llama: Lab, tmp_path: Path) -> Iterator[Registry]:
    """A registry over the engine's store that removes unused adapters from the engine; "bot" is the adapter "all"."""
    hooks = FakeHooks(drive.engine.runner.base.layout.fingerprint, on_unused=drive.engine.remove_adapter)
    database = open_sqlite(tmp_path / "registry.sqlite3")
    registry = Registry(database, drive.store, hooks)
    registry.register_folder("bot", llama.folders["all"])
    yield registry
    database.close()


def ask(drive: Drive, lease: Lease, length: int) -> str:
    """Submit a greedy request for an acquired adapter. Returns the sequence's id."""
    adaptation = (WeightedAdapter(lease.version.content, 1.0, lease.version.rank),)
    return drive.submit_adapted(adaptation, PROMPT, SamplingParams(temperature=0, max_tokens=length))


def test_an_adapter_is_replaced_while_it_runs(drive: Drive, registry: Registry, llama: Lab) -> None:
    before = llama.oracle.solo(OLD, PROMPT, LONG).tokens
    after = llama.oracle.solo(NEW, PROMPT, LONG).tokens
    assert before[:SHORT] != after[:SHORT]

    (old,) = registry.acquire(["bot"])
    ask(drive, old, 1)
    drive.run()
    running = ask(drive, old, LONG)
    while len(drive.tokens[running]) < 5:
        drive.step()
    assert drive.cached[running] > 0, "the prefix cache is warm for the old content"

    replaced = registry.register_folder("bot", llama.folders["rslora"])
    (new,) = registry.acquire(["bot"])
    assert new.version == replaced.version != old.version
    later = ask(drive, new, SHORT)
    drive.run()
    assert tuple(drive.tokens[running]) == before
    assert tuple(drive.tokens[later]) == after[:SHORT]
    assert drive.cached[later] == 0

    again = ask(drive, new, SHORT)
    drive.run()
    assert tuple(drive.tokens[again]) == after[:SHORT]
    assert drive.cached[again] > 0


def test_old_content_is_removed_with_its_last_lease(drive: Drive, registry: Registry, llama: Lab) -> None:
    (old,) = registry.acquire(["bot"])
    running = ask(drive, old, LONG)
    while len(drive.tokens[running]) < 5:
        drive.step()
    registry.register_folder("bot", llama.folders["odd"])
    registry.remove("bot")
    drive.step()
    assert old.version.content in drive.resident()
    assert drive.store.path(old.version.content).is_dir()

    drive.run()
    registry.release([old])
    registry.tidy()
    drive.step()
    assert old.version.content not in drive.resident()
    assert old.version.content not in drive.engine.stats().host_adapters
    assert not drive.store.path(old.version.content).exists()
    assert tuple(drive.tokens[running]) == llama.oracle.solo(OLD, PROMPT, LONG).tokens


def test_old_new_and_old_content_in_turn(drive: Drive, registry: Registry, llama: Lab) -> None:
    """Each answers with its own weights, though all prefixes are cached."""
    for name in ("all", "rslora", "all", "odd", "rslora"):
        registry.register_folder("bot", llama.folders[name])
        (lease,) = registry.acquire(["bot"])
        first, second = ask(drive, lease, SHORT), ask(drive, lease, SHORT)
        drive.run()
        registry.release([lease])
        expected = llama.oracle.solo(((name, 1.0),), PROMPT, SHORT).tokens
        assert tuple(drive.tokens[first]) == tuple(drive.tokens[second]) == expected
