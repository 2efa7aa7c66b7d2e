"""Loader: reads adapters from disk into a host memory cache, on worker threads, each at most once at a time.

Worker threads read, check and pack adapters; only the engine's thread uses the cache. The least recently used adapters
are evicted when it grows over its capacity.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from time import perf_counter

import torch

from adapters.format.spec import AdapterId
from bases import machine
from server.compute.pool import PackedAdapter

WORKERS = 2

_Loaded = tuple[PackedAdapter, float]
"""An adapter, and the seconds that it took to read."""


class Loader:
    """Cache of adapters in host memory.

    ``load`` reads one adapter, ``on_loaded`` is called when that is done; both on worker threads. ``capacity`` is in
    bytes. The adapter loaded last is kept even if it is larger.
    """

    def __init__(
        self, load: Callable[[AdapterId], PackedAdapter], capacity: int, on_loaded: Callable[[], None]
    ) -> None:
        self._load = load
        self._capacity = capacity
        self._on_loaded = on_loaded
        self._cache: OrderedDict[AdapterId, PackedAdapter] = OrderedDict()
        self._bytes = 0
        self._largest = 0
        self._pending: dict[AdapterId, Future[_Loaded]] = {}
        self._loaded: SimpleQueue[tuple[AdapterId, Future[_Loaded]]] = SimpleQueue()
        self._new: dict[AdapterId, float] = {}
        """Adapters in the cache that :meth:`read_seconds` was not asked about, and how long they took to read."""
        self.reads = 0
        """Loads that began."""
        self.evictions = 0
        self._workers = ThreadPoolExecutor(
            WORKERS, "adapter-loader", initializer=_start_worker, initargs=(machine.cpu_affinity(),)
        )
        self.adapters: frozenset[AdapterId] = frozenset()
        """Adapters in the cache. The set is replaced, never changed, so any thread may read it."""

    def get(self, adapter: AdapterId) -> PackedAdapter | None:
        """Return the adapter if it is in the cache, as the most recently used one."""
        packed = self._cache.get(adapter)
        if packed is not None:
            self._cache.move_to_end(adapter)
        return packed

    @property
    def max_prefetch(self) -> int:
        """How many adapters of the largest size seen the cache holds, at least 1. Loading more ahead would thrash."""
        return max(1, self._capacity // self._largest) if self._largest else 1

    def request(self, adapter: AdapterId) -> None:
        """Start loading an adapter, unless that has been started."""
        if adapter in self._pending:
            return
        self.reads += 1
        future = self._pending[adapter] = self._workers.submit(self._timed_load, adapter)
        future.add_done_callback(lambda done: self._put_loaded(adapter, done))

    def _timed_load(self, adapter: AdapterId) -> _Loaded:
        started = perf_counter()
        return self._load(adapter), perf_counter() - started

    def _put_loaded(self, adapter: AdapterId, done: Future[_Loaded]) -> None:
        self._loaded.put((adapter, done))
        self._on_loaded()

    def collect(self) -> dict[AdapterId, BaseException]:
        """Move loaded adapters into the cache. Returns the adapters that could not be loaded, and their errors."""
        failures: dict[AdapterId, BaseException] = {}
        while not self._loaded.empty():
            adapter, done = self._loaded.get()
            if self._pending.get(adapter) is not done:
                continue  # dropped, and maybe requested again, since this load started
            del self._pending[adapter]
            error = done.exception()
            if error is not None:
                failures[adapter] = error
            else:
                self._insert(adapter, *done.result())
        return failures

    def read_seconds(self, adapter: AdapterId) -> float | None:
        """How long an adapter in the cache took to read; None if this was asked since it was read."""
        return self._new.pop(adapter, None)

    @property
    def nbytes(self) -> int:
        """Bytes in the cache."""
        return self._bytes

    def _insert(self, adapter: AdapterId, packed: PackedAdapter, seconds: float) -> None:
        self.drop(adapter)
        self._cache[adapter] = packed
        self._new[adapter] = seconds
        self._bytes += packed.nbytes
        self._largest = max(self._largest, packed.nbytes)
        while self._bytes > self._capacity and len(self._cache) > 1:
            self.drop(next(iter(self._cache)))
            self.evictions += 1
        self.adapters = frozenset(self._cache)

    def drop(self, adapter: AdapterId) -> None:
        """Remove an adapter from the cache, and ignore the result if it is being loaded."""
        self._pending.pop(adapter, None)
        self._new.pop(adapter, None)
        packed = self._cache.pop(adapter, None)
        if packed is not None:
            self._bytes -= packed.nbytes
            self.adapters = frozenset(self._cache)

    def drop_all(self, *, but: AdapterId | None = None) -> int:
        """Empty the cache, except for one adapter. Returns how many were dropped; loads go on."""
        dropped = [adapter for adapter in self._cache if adapter != but]
        for adapter in dropped:
            self._bytes -= self._cache.pop(adapter).nbytes
            self._new.pop(adapter, None)
        self.adapters = frozenset(self._cache)
        return len(dropped)

    def close(self) -> None:
        """Stop the workers after the loads that have begun; cancel the others."""
        self._workers.shutdown(cancel_futures=True)


def _start_worker(cpus: set[int]) -> None:
    """Let a worker run on all ``cpus``: the engine's thread, which starts it, may be bound to one."""
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(1)
