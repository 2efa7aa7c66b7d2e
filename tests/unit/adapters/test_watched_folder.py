"""The watched folder: new and changed folders are registered, bad ones listed, unchanged ones not read."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.errors import AdapterUnavailable, RegistryUnavailable, StoreFull
from adapters.registry.registration import Registered
from adapters.registry.registry import Registry
from adapters.sources.folder_states import FolderState
from adapters.sources.watched_folder import RETRY_SECONDS, SETTLE_SECONDS, WatchedFolder
from tests.adapter_folders import CONFIG, DEFECTS, WEIGHTS
from tests.unit.adapters.registries import open_registry, write

LATER = time.time() + 86_400  # computed at collection; other tests may run first
"""A time (Unix, seconds) when all files have settled."""


class Memory(dict[str, FolderState]):
    """The saved states, which survive a restart."""

    def put(self, folder: str, seen: FolderState | None) -> None:
        self.pop(folder, None)
        if seen is not None:
            self[folder] = seen


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path, reserved=frozenset({"base"})) as registry:
        yield registry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "watched").mkdir()
    return tmp_path / "watched"


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def watch(root: Path, registry: Registry, memory: Memory) -> WatchedFolder:
    return WatchedFolder(root, registry, memory, memory.put)


def reasons(watch: WatchedFolder) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in watch.refusals()}


def replace(folder: Path, seed: int) -> None:
    """Replace the content as a careful operator would: write beside the old files, then rename."""
    other = write(folder.parent / ".other", seed)
    for name in (CONFIG, WEIGHTS):
        (other / name).replace(folder / name)


def test_each_folder_is_an_adapter_and_each_change_a_version(
    watch: WatchedFolder, registry: Registry, root: Path
) -> None:
    write(root / "legal", 0)
    write(root / "medical", 1)
    assert sorted(watch.scan(LATER)) == ["legal", "medical"]
    assert watch.scan(LATER) == []
    replace(root / "legal", 2)
    assert watch.scan(LATER) == ["legal"]
    assert registry.version("legal").name == "legal@2"
    assert registry.version("medical").name == "medical@1"
    assert watch.refusals() == []


def test_folder_being_written_is_not_registered_yet(watch: WatchedFolder, root: Path) -> None:
    now = time.time()
    folder = write(root / "legal", 0)
    assert watch.scan(now) == []
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    os.utime(folder / WEIGHTS, (now, now + 50))
    assert watch.scan(now) == []
    write(folder, 0)
    for name in (CONFIG, WEIGHTS):
        os.utime(folder / name, (now, now + 60))
    assert watch.scan(now) == []
    assert watch.scan(now) == ["legal"]
    assert watch.refusals() == []


def test_settled_files_are_registered_at_once(registry: Registry, root: Path, memory: Memory) -> None:
    folder = write(root / "legal", 0)
    now = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    assert WatchedFolder(root, registry, memory, memory.put).scan(now + SETTLE_SECONDS - 0.1) == []
    assert WatchedFolder(root, registry, memory, memory.put).scan(now + SETTLE_SECONDS + 0.1) == ["legal"]


def test_refused_folder_is_listed_until_it_is_repaired(watch: WatchedFolder, registry: Registry, root: Path) -> None:
    for name in ("a", "bad", "z"):
        write(root / name, 0)
    DEFECTS["cut_in_data"].spoil(root / "bad")
    assert sorted(watch.scan(LATER)) == ["a", "z"]
    (refusal,) = watch.refusals()
    assert (refusal.name, refusal.source, refusal.since) == ("bad", "watched/bad", int(LATER))
    assert "reaches past the end of the file" in refusal.reason
    assert watch.scan(LATER + 5) == []
    assert watch.refusals() == [refusal]
    replace(root / "bad", 3)
    assert watch.scan(LATER) == ["bad"]
    assert watch.refusals() == []
    assert registry.version("bad").number == 1


def test_refused_replacement_keeps_the_previous_version(watch: WatchedFolder, registry: Registry, root: Path) -> None:
    write(root / "legal", 0)
    watch.scan(LATER)
    (root / "legal" / CONFIG).unlink()
    assert watch.scan(LATER) == []
    assert reasons(watch) == {"legal": f"{CONFIG}: is missing"}
    assert registry.version("legal").name == "legal@1"


@pytest.mark.parametrize("name", ["with space", "base", "legal@2", "ünïcode", os.fsdecode(b"\xff\xfe")])
def test_folder_with_an_invalid_name_is_refused(watch: WatchedFolder, root: Path, name: str) -> None:
    write(root / name, 0)
    assert watch.scan(LATER) == []
    assert "cannot name an adapter" in reasons(watch)[name]
    shutil.rmtree(root / name)
    watch.scan(LATER)
    assert watch.refusals() == []


def test_files_and_hidden_folders_are_ignored(watch: WatchedFolder, root: Path, tmp_path: Path) -> None:
    write(root / ".hidden", 0)
    (root / "file").write_text("x")
    (root / "dangling").symlink_to(tmp_path / "nothing")
    assert watch.scan(LATER) == []
    assert watch.refusals() == []


def test_link_to_itself_is_refused(watch: WatchedFolder, root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    write(root / "legal", 0)
    assert watch.scan(LATER) == ["legal"]
    assert "cannot be read" in reasons(watch)["loop"] or "is not a folder" in reasons(watch)["loop"]


def test_a_kubernetes_volume(watch: WatchedFolder, registry: Registry, root: Path) -> None:
    """Files are links through ..data, which is renamed to point to a new folder."""
    write(root / "legal" / "..1", 0)
    write(root / "legal" / "..2", 1)
    (root / "legal" / "..data").symlink_to("..1")
    for name in (CONFIG, WEIGHTS):
        (root / "legal" / name).symlink_to(f"..data/{name}")
    (root / "linked").symlink_to(root / "legal")
    assert sorted(watch.scan(LATER)) == ["legal", "linked"]
    (root / "legal" / "..new").symlink_to("..2")
    (root / "legal" / "..new").rename(root / "legal" / "..data")
    assert sorted(watch.scan(LATER)) == ["legal", "linked"]
    assert registry.version("legal").name == "legal@2"


def test_restart_registers_nothing_again(
    watch: WatchedFolder, registry: Registry, root: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "legal", 0)
    write(root / "bad", 1)
    write(root / "gone", 1)
    for name in ("bad", "gone"):
        DEFECTS["cut_in_data"].spoil(root / name)
    watch.scan(LATER)
    replace(root / "legal", 2)
    watch.scan(LATER)
    registry.activate("legal", 1)
    shutil.rmtree(root / "gone")
    nested = {f"{root}/legal/deeper": FolderState("", "of another day", 0)}

    again = WatchedFolder(root, registry, memory | nested, memory.put)
    assert sorted(reasons(again)) == ["bad", "gone"]
    monkeypatch.setattr(registry, "register_folder", lambda name, folder: pytest.fail(f"{name} was read again"))
    assert again.scan(LATER) == []
    assert again.refusals() == [refusal for refusal in watch.refusals() if refusal.name == "bad"]
    assert registry.version("legal").number == 1
    assert sorted(memory) == [f"{root}/bad", f"{root}/legal"]


def test_removed_folder_keeps_its_adapter(watch: WatchedFolder, registry: Registry, root: Path, tmp_path: Path) -> None:
    write(root / "legal", 0)
    watch.scan(LATER)
    (root / "legal").rename(tmp_path / "aside")
    assert watch.scan(LATER) == []
    assert registry.version("legal").number == 1
    (tmp_path / "aside").rename(root / "legal")
    assert watch.scan(LATER) == []


class Failing:
    """A registry that raises ``failures``, then works."""

    def __init__(self, registry: Registry, *failures: Exception) -> None:
        self._registry = registry
        self._failures = list(failures)
        self.calls = 0

    def register_folder(self, name: str, folder: Path) -> Registered:
        self.calls += 1
        if self._failures:
            raise self._failures.pop(0)
        return self._registry.register_folder(name, folder)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreFull("no room"), "no room"),
        (RegistryUnavailable("no database"), "no database"),
        (AdapterUnavailable("legal", "no memory"), "The adapter `legal` cannot be served: no memory."),
        (RuntimeError("the engine is busy"), "something went wrong on the server; it is in its log"),
    ],
)
def test_errors_of_the_server_are_retried(
    registry: Registry, root: Path, memory: Memory, error: Exception, reason: str
) -> None:
    failing = Failing(registry, error, error)
    watch = WatchedFolder(root, failing, memory, memory.put)
    write(root / "legal", 0)
    for late in range(2):
        assert watch.scan(LATER + late * RETRY_SECONDS) == []
        assert watch.scan(LATER + late * RETRY_SECONDS + 1) == []  # too early
        assert [(refusal.reason, refusal.since) for refusal in watch.refusals()] == [(reason, int(LATER))]
        assert memory == {}
    assert failing.calls == 2
    assert watch.scan(LATER + 2 * RETRY_SECONDS) == ["legal"]
    assert watch.refusals() == []
    assert len(memory) == 1


def test_a_clock_that_is_set_back_delays_no_retry(registry: Registry, root: Path, memory: Memory) -> None:
    watch = WatchedFolder(root, Failing(registry, StoreFull("no room")), memory, memory.put)
    write(root / "legal", 0)
    assert watch.scan(LATER + 86_400) == []
    assert watch.scan(LATER) == ["legal"]  # a day earlier: nobody would wait for that day


def test_folders_that_are_gone_are_not_to_be_tried_again(registry: Registry, root: Path, memory: Memory) -> None:
    errors = [StoreFull("no room") for _ in range(3)]
    watch = WatchedFolder(root, Failing(registry, *errors), memory, memory.put)
    for number in range(3):
        write(root / f"job-{number}", 0)
        assert watch.scan(LATER) == []
        shutil.rmtree(root / f"job-{number}")
    watch.scan(LATER)
    assert watch._retry_at == {}


def test_state_that_cannot_be_saved_is_retried(registry: Registry, root: Path, memory: Memory) -> None:
    down = True

    def remember(folder: str, seen: FolderState | None) -> None:
        if down:
            raise RegistryUnavailable("no database")
        memory.put(folder, seen)

    watch = WatchedFolder(root, registry, memory, remember)
    write(root / "legal", 0)
    write(root / "bad", 1)
    DEFECTS["cut_in_data"].spoil(root / "bad")
    assert watch.scan(LATER) == []
    assert reasons(watch) == {"legal": "no database", "bad": "no database"}
    down = False
    assert watch.scan(LATER + RETRY_SECONDS) == ["legal"]
    down = True
    shutil.rmtree(root / "bad")
    watch.scan(LATER)
    assert sorted(reasons(watch)) == ["bad"]
    down = False
    watch.scan(LATER)
    assert watch.refusals() == []
    assert list(memory) == [f"{root}/legal"]


def test_unexpected_error_is_logged_and_other_folders_are_registered(
    registry: Registry, root: Path, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(registry, ZeroDivisionError("boom"))
    watch = WatchedFolder(root, failing, memory, memory.put)
    write(root / "a", 0)
    write(root / "b", 1)
    (registered,) = watch.scan(LATER)
    assert set(reasons(watch)) == {"a", "b"} - {registered}
    assert "ZeroDivisionError: boom" in caplog.text
    assert watch.scan(LATER) == []
    assert failing.calls == 2
    assert list(memory) == [f"{root}/{registered}"]


def test_unreadable_watched_folder_is_logged_once(
    watch: WatchedFolder, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(root / "legal", 0)
    write(root / "bad", 1)
    DEFECTS["cut_in_data"].spoil(root / "bad")
    watch.scan(LATER)
    root.rename(tmp_path / "aside")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert watch.scan(LATER) == []
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert sorted(reasons(watch)) == ["bad"]
        (tmp_path / "aside").rename(root)
        assert watch.scan(LATER) == []
    assert "can be read again" in caplog.text


@pytest.fixture
def run() -> Iterator[Callable[[WatchedFolder], threading.Event]]:
    """Run a watched folder on a thread until the test ends."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def start(watch: WatchedFolder) -> threading.Event:
        threads.append(threading.Thread(target=watch.run, args=(stop,)))
        threads[-1].start()
        return stop

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_run_scans_until_stopped(
    watch: WatchedFolder, registry: Registry, root: Path, run: Callable[[WatchedFolder], threading.Event]
) -> None:
    run(watch)
    write(root / "legal", 0)
    deadline = time.monotonic() + 10
    while not registry.knows("legal"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_scan_of_unchanged_folders_is_cheap(watch: WatchedFolder, root: Path, memory: Memory) -> None:
    for index in range(2000):
        (root / f"a{index}").mkdir()
    assert watch.scan(LATER) == []
    assert len(watch.refusals()) == 2000
    begun = time.thread_time()
    watch.scan(LATER)
    # Measured: 10 us per folder. Opening and listing a folder costs about 40, reading its files far more.
    assert time.thread_time() - begun < 2000 * 100e-6
