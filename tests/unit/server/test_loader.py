"""Loader: loads an adapter at most once at a time, and ignores the result if it was dropped."""

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from adapters.format.spec import AdapterId
from server.compute.pool import PackedAdapter
from server.engine.loader import Loader

A, B, C = (AdapterId(name) for name in "abc")


class Disk:
    """Loads that wait until the test lets them finish."""

    def __init__(self) -> None:
        self.reads: list[AdapterId] = []
        self.broken: set[AdapterId] = set()
        self.cpus: list[set[int]] = []
        """CPUs that the worker of each read may run on."""
        self.gate = threading.Event()
        self.loaded = threading.Semaphore(0)

    def read(self, adapter: AdapterId) -> PackedAdapter:
        self.reads.append(adapter)
        self.cpus.append(os.sched_getaffinity(0))
        broken = adapter in self.broken
        assert self.gate.wait(10)
        if broken:
            raise OSError("gone")
        return PackedAdapter(8, {}, frozenset(), nbytes=10)

    def finish(self, count: int = 1) -> None:
        """Let the loads finish, and wait for ``count`` of them."""
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


def test_the_least_recently_used_adapter_is_evicted(disk: Disk, make: Callable[[int], Loader]) -> None:
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


def test_one_adapter_is_kept_even_if_larger_than_the_cache(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(0)
    loader.request(A)
    disk.finish()
    loader.collect()
    assert loader.adapters == {A}


def test_the_result_of_a_dropped_load_is_ignored(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(100)
    loader.request(A)
    loader.drop(A)
    disk.finish()
    assert loader.collect() == {}
    assert loader.adapters == frozenset()


def test_a_dropped_load_that_fails_does_not_fail_the_next_one(disk: Disk, make: Callable[[int], Loader]) -> None:
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


def test_a_failure_is_reported_once(disk: Disk, make: Callable[[int], Loader]) -> None:
    loader = make(100)
    disk.broken.add(A)
    loader.request(A)
    disk.finish()
    failures = loader.collect()
    assert list(failures) == [A]
    assert "gone" in str(failures[A])
    assert loader.collect() == {}


def test_workers_run_on_all_cpus_though_the_engines_thread_is_bound_to_one(
    disk: Disk, make: Callable[[int], Loader]
) -> None:
    cpus = os.sched_getaffinity(0)
    loader = make(100)

    def request() -> None:
        os.sched_setaffinity(0, {min(cpus)})
        loader.request(A)

    thread = threading.Thread(target=request)
    thread.start()
    thread.join()
    disk.finish()
    assert disk.cpus == [cpus]


def test_of_adapters_that_were_dropped_nothing_is_kept(disk: Disk, make: Callable[[int], Loader]) -> None:
    """Also how long a read took, which would be that of an earlier one for an adapter that is read again."""
    loader = make(100)
    for adapter in (A, B):
        loader.request(adapter)
    disk.finish(2)
    assert loader.collect() == {}
    assert loader.drop_all(but=B) == 1
    assert (loader.adapters, loader.nbytes) == ({B}, 10)
    assert loader.read_seconds(A) is None
    assert loader.read_seconds(B) is not None
