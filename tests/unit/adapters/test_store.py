"""The store: content by its digest, complete or absent, and never served damaged."""

import errno
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.errors import AdapterError, AdapterRejected, StoreFull
from adapters.format.content import content_id
from adapters.format.spec import AdapterId, BaseLayout
from adapters.format.training_record import CARD, RECORDS
from adapters.store import store as module
from adapters.store.remote_store import RemoteStore
from adapters.store.store import AdapterStore, folder_bytes
from tests.adapter_folders import CONFIG, DEFECTS, KEY_A, LAYERS, ORIGIN, WEIGHTS, add, layout_of, write_adapter
from tests.tiny import tiny_model
from tests.unit.adapters.registries import ids_in

MAX_RANK = 16
NOBODY = AdapterId("0" * 64)


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    return layout_of(tiny_model("llama"))


@pytest.fixture
def store(tmp_path: Path, layout: BaseLayout) -> AdapterStore:
    return AdapterStore(tmp_path / "store", layout, MAX_RANK)


@pytest.fixture
def folder(tmp_path: Path, layout: BaseLayout) -> Path:
    return write_adapter(tmp_path / "source", layout)


def entries(store: AdapterStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_entry_is_a_copy_of_the_content_under_its_digest(store: AdapterStore, folder: Path) -> None:
    (folder / ORIGIN).write_text("{}")
    (folder / CARD).write_text("shown, and not part of the content")
    (folder / "notes.txt").write_text("neither")
    spec = add(store, folder)
    assert entries(store) == [spec.id]
    assert spec.id == content_id(folder)
    assert sorted(path.name for path in store.path(spec.id).iterdir()) == sorted([CONFIG, WEIGHTS, ORIGIN, RECORDS])
    kept = [path for path in store.path(spec.id).rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == sorted([CONFIG, WEIGHTS, ORIGIN, CARD])
    for path in kept:
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_same_content_is_one_entry(store: AdapterStore, tmp_path: Path, layout: BaseLayout) -> None:
    first = add(store, write_adapter(tmp_path / "a", layout))
    again = add(store, write_adapter(tmp_path / "b", layout))
    other = add(store, write_adapter(tmp_path / "c", layout, seed=1))
    assert first == again
    assert entries(store) == sorted([first.id, other.id])


def test_links_are_copied_as_files(store: AdapterStore, folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(folder / name)
    spec = add(store, linked)
    assert not any(path.is_symlink() for path in store.path(spec.id).iterdir())


@pytest.mark.parametrize("defect", ["nan", "cut_in_data", "pickle", "weights_fifo", "config_device", "config_large"])
def test_rejected_content_leaves_nothing(defect: str, store: AdapterStore, folder: Path) -> None:
    DEFECTS[defect].spoil(folder)
    with pytest.raises(AdapterRejected, match=DEFECTS[defect].reason.split("{")[0]):
        add(store, folder)
    assert entries(store) == []


def test_weights_larger_than_any_adapter_are_not_copied(store: AdapterStore, folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 1 << 40)
    with pytest.raises(AdapterRejected, match="is larger than"):
        add(store, folder)
    assert entries(store) == []


def test_weights_are_copied_to_memory(store: AdapterStore, folder: Path) -> None:
    spec = add(store, folder)
    weights = store.read(spec.id)
    expected = load_file(folder / WEIGHTS)[KEY_A]
    with (store.path(spec.id) / WEIGHTS).open("r+b") as file:
        file.write(bytes(spec.size_bytes))
    assert weights.spec == spec
    assert torch.equal(weights.tensors[LAYERS[0]][0], expected)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_damage_is_detected_and_repaired_by_adding_again(name: str, store: AdapterStore, folder: Path) -> None:
    spec = add(store, folder)
    path = store.path(spec.id) / name
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=f"adapter {spec.id} is damaged on disk"):
        store.read(spec.id)
    assert add(store, folder) == spec
    assert store.read(spec.id).spec == spec
    assert entries(store) == [spec.id]


def test_missing_file_is_damage(store: AdapterStore, folder: Path) -> None:
    spec = add(store, folder)
    (store.path(spec.id) / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="is damaged on disk"):
        store.read(spec.id)


def test_removed_entry_is_gone(store: AdapterStore, folder: Path) -> None:
    spec = add(store, folder)
    assert spec.id in store
    store.erase(spec.id)
    assert spec.id not in store
    assert entries(store) == []


def test_missing_entry_is_an_error(store: AdapterStore) -> None:
    with pytest.raises(AdapterError, match="is not stored"):
        store.read(NOBODY)
    assert store.detach(NOBODY) is None
    store.erase(NOBODY)


def test_spec_cache_is_bounded(
    store: AdapterStore, tmp_path: Path, layout: BaseLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SPECS", 2)
    ids = [add(store, write_adapter(tmp_path / str(seed), layout, seed=seed)).id for seed in range(4)]
    for adapter_id in ids * 2:
        assert store.read(adapter_id).spec.id == adapter_id
    assert len(store._specs) == 2


def test_an_adapter_of_another_base(store: AdapterStore, folder: Path) -> None:
    """An adapter accepted despite another base can be read."""
    (folder / ORIGIN).write_text('{"base_fingerprint": "another"}')
    with pytest.raises(AdapterRejected, match="trained on the base another") as refusal:
        add(store, folder)
    assert refusal.value.code == "base_mismatch"
    with store.stage() as staging:
        store.copy(folder, staging)
        spec = store.seal(staging, any_base=True)
        store.publish(staging, spec.id)
    assert store.read(spec.id).spec.base_fingerprint == "another"


def test_without_a_remote_nothing_is_evicted(tmp_path: Path, layout: BaseLayout) -> None:
    """Then the root holds the only copies."""
    store = AdapterStore(tmp_path / "store", layout, MAX_RANK, cache=1)
    specs = [add(store, write_adapter(tmp_path / f"{seed}", layout, seed=seed)) for seed in range(3)]
    assert store.ids() == {spec.id for spec in specs}
    for spec in specs:
        store.read(spec.id)


def test_copies_of_the_remote_are_evicted_and_restored(tmp_path: Path, layout: BaseLayout) -> None:
    """The remote keeps all contents, the disk the most recently read."""
    remote = RemoteStore(f"file://{tmp_path}/remote")
    size = folder_bytes(write_adapter(tmp_path / "0", layout))
    store = AdapterStore(tmp_path / "store", layout, MAX_RANK, remote=remote, cache=2 * size + 100)
    ids = [add(store, write_adapter(tmp_path / str(seed), layout, seed=seed)).id for seed in range(4)]
    assert sorted(ids_in(remote)) == sorted(ids)
    assert entries(store) == sorted(ids[2:])
    assert store.read(ids[0]).spec.id == ids[0]
    assert entries(store) == sorted([ids[0], ids[3]])
    store.read(ids[3])
    store.read(ids[1])
    assert entries(store) == sorted([ids[1], ids[3]])
    store.erase(ids[0])
    assert sorted(ids_in(remote)) == sorted(ids[1:])
    with pytest.raises(AdapterError):
        store.read(ids[0])


def test_local_damage_is_repaired_from_the_remote_and_remote_damage_detected(
    tmp_path: Path, layout: BaseLayout
) -> None:
    remote = RemoteStore(f"file://{tmp_path}/remote")
    store = AdapterStore(tmp_path / "store", layout, MAX_RANK, remote=remote)
    adapter_id = add(store, write_adapter(tmp_path / "source", layout)).id
    (store.path(adapter_id) / WEIGHTS).write_bytes(b"rotten")
    assert store.read(adapter_id).spec.id == adapter_id
    store.detach(adapter_id)
    with (tmp_path / "remote" / adapter_id / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(AdapterError, match="damaged in the remote store"):
        store.read(adapter_id)
    assert adapter_id not in store


def test_copy_is_not_evicted_during_upload(tmp_path: Path, layout: BaseLayout) -> None:
    """Although the copies exceed the limit, and another adapter is added meanwhile."""
    folders = [write_adapter(tmp_path / str(seed), layout, seed=seed) for seed in range(2)]

    class Crowded(RemoteStore):
        def put(self, adapter_id: AdapterId, folder: Path, record: str | None = None) -> None:
            if folders:
                add(store, folders.pop())
            super().put(adapter_id, folder, record)

    store = AdapterStore(tmp_path / "store", layout, MAX_RANK, remote=Crowded(f"file://{tmp_path}/remote"), cache=1)
    adapter_id = add(store, folders.pop()).id
    assert store.read(adapter_id).spec.id == adapter_id


@pytest.mark.parametrize("call", ["iterdir", "rename", "rmtree"])
def test_loads_are_not_blocked_by_a_slow_eviction(
    call: str, tmp_path: Path, layout: BaseLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file system call hangs."""
    size = folder_bytes(write_adapter(tmp_path / "0", layout))
    remote = RemoteStore(f"file://{tmp_path}/remote")
    store = AdapterStore(tmp_path / "store", layout, MAX_RANK, remote=remote, cache=3 * size + 100)
    ids = [add(store, write_adapter(tmp_path / str(seed), layout, seed=seed)).id for seed in range(4)]
    assert ids[0] not in store
    reached, gate = threading.Event(), threading.Event()
    owner = shutil if call == "rmtree" else Path
    original = getattr(owner, call)

    def slow(path: Path, *arguments: object, **options: object) -> object:
        if path in (store.root, store.path(ids[1])) or (path.name.startswith(".tmp-") and call == "rmtree"):
            reached.set()
            assert gate.wait(30)
        return original(path, *arguments, **options)

    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(owner, call, slow)
        trimming = pool.submit(store.read, ids[0])
        assert reached.wait(10)
        monkeypatch.setattr(owner, call, original)
        for other in ids[2:]:
            assert pool.submit(store.read, other).result(10).spec.id == other
        added = pool.submit(add, store, write_adapter(tmp_path / "new", layout, seed=9)).result(10)
        assert not trimming.done()
        victim = pool.submit(store.read, ids[1])
        if call == "rename":
            with pytest.raises(TimeoutError):
                victim.result(0.1)
        gate.set()
        assert trimming.result(10).spec.id == ids[0]
        assert victim.result(10).spec.id == ids[1]
        assert pool.submit(store.read, added.id).result(10).spec.id == added.id
    assert len(store.ids()) <= 3, "what came meanwhile was counted, too"


@pytest.mark.parametrize("name", ["", "..", "../x", "0" * 63, "0" * 64 + "\n", "G" * 64])
def test_path_requires_a_valid_id(name: str, store: AdapterStore) -> None:
    with pytest.raises(AdapterError, match="is not an adapter id"):
        store.path(AdapterId(name))


def test_sweep_keeps_referenced_and_foreign_files(store: AdapterStore, tmp_path: Path, layout: BaseLayout) -> None:
    kept = add(store, write_adapter(tmp_path / "a", layout))
    add(store, write_adapter(tmp_path / "b", layout, seed=1))
    (store.root / ".tmp-crashed").mkdir()
    (store.root / ".tmp-crashed" / WEIGHTS).write_bytes(b"half")
    (store.root / "notes.txt").write_text("mine")
    store.sweep({kept.id})
    assert entries(store) == sorted([kept.id, "notes.txt"])


def test_reopened_store_has_its_entries(store: AdapterStore, folder: Path, layout: BaseLayout) -> None:
    spec = add(store, folder)
    assert AdapterStore(store.root, layout, MAX_RANK).read(spec.id).spec == spec


def test_disk_full_while_writing(store: AdapterStore, folder: Path) -> None:
    with file_size_limit(1000), pytest.raises(StoreFull, match="no room to store the adapter"):
        add(store, folder)
    assert entries(store) == []
    add(store, folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_reported_by_fsync(
    code: int, store: AdapterStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems that allocate late report a full disk at fsync."""

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull, match="no room to store the adapter"):
        add(store, folder)
    assert entries(store) == []
