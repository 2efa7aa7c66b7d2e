"""The loader: each adapter at most once at a time, and nothing of what was dropped."""

import threading
from collections.abc import Callable, Iterator

import pytest

from adapters.format.spec import AdapterId
from server.compute.pool import PackedAdapter
from server.engine.loader import Loader

A, B, C = (AdapterId(name) for name in "abc")


class Disk:
    """Reads that wait until the test lets them go."""

    def __init__(self) -> None:
        self.reads: list[AdapterId] = []
        self.broken: set[AdapterId] = set()
        self.gate = threading.Event()
        self.loaded = threading.Semaphore(0)

    def read(self, adapter: AdapterId) -> PackedAdapter:
        self.reads.append(adapter)
        broken = adapter in self.broken
        assert self.gate.wait(10)
        if broken:
            raise OSError("gone")
        return PackedAdapter(8, {}, frozenset(), nbytes=10)

    def finish(self, count: int = 1) -> None:
        """Let the reads go and wait for ``count`` of them."""
        self.gate.set()
        for _ in range(count):
            assert self.loaded.acquire(timeout=10)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def make(disk: Disk) -> Iterator[Callable[[int], Loader]]:
    made: list[Loader] = []

    def make(capacity: int) -> Loader:
        made.append(Loader(disk.read, capacity, disk.loaded.release))
        return made[-1]

    yield make
    disk.gate.set()
    for loader in made:
        loader.close()


def test_requests_for_one_adapter_are_one_read(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(100)
    for _ in range(5):
        loader.request(A)
    disk.finish()
    assert loader.collect() == {}
    assert loader.get(A)
    assert disk.reads == [A]


def test_the_least_recently_used_leaves_first(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(20)
    for adapter in (A, B):
        loader.request(adapter)
        disk.finish()
        loader.collect()
    assert loader.get(A)
    loader.request(C)
    disk.finish()
    loader.collect()
    assert loader.adapters == {A, C}


def test_one_adapter_is_kept_however_small_the_cache(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(0)
    loader.request(A)
    disk.finish()
    loader.collect()
    assert loader.adapters == {A}


def test_a_read_that_was_dropped_leaves_nothing(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(100)
    loader.request(A)
    loader.drop(A)
    disk.finish()
    assert loader.collect() == {}
    assert loader.adapters == frozenset()


def test_a_dropped_reads_failure_is_not_the_next_ones(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(100)
    disk.broken.add(A)
    loader.request(A)
    while not disk.reads:
        pass
    loader.drop(A)
    disk.broken.clear()
    loader.request(A)
    disk.finish(2)
    assert loader.collect() == {}
    assert loader.get(A)


def test_a_failure_is_told_once(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(100)
    disk.broken.add(A)
    loader.request(A)
    disk.finish()
    failures = loader.collect()
    assert list(failures) == [A]
    assert "gone" in str(failures[A])
    assert loader.collect() == {}
