"""Loader: adapters from disk to host memory, off the engine's thread, each at most once at a time.

Worker threads read, check and pack; the engine's thread alone touches the cache. Least recently used adapters leave
host memory when it passes its bound.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import torch

from adapters.format.spec import AdapterId
from server.compute.pool import PackedAdapter

WORKERS = 2


class Loader:
    """Host memory for adapters, filled by ``load`` on worker threads; ``wake`` is called when something arrives."""

    def __init__(self, load: Callable[[AdapterId], PackedAdapter], capacity: int, wake: Callable[[], None]) -> None:
        self._load = load
        self._capacity = capacity
        self._wake = wake
        self._cache: OrderedDict[AdapterId, PackedAdapter] = OrderedDict()
        self._bytes = 0
        self._largest = 0
        self._pending: dict[AdapterId, Future[PackedAdapter]] = {}
        self._arrived: SimpleQueue[tuple[AdapterId, Future[PackedAdapter]]] = SimpleQueue()
        self._workers = ThreadPoolExecutor(WORKERS, "adapter-loader", initializer=torch.set_num_threads, initargs=(1,))
        self.host: frozenset[AdapterId] = frozenset()
        """Adapters in host memory; replaced, never changed, so any thread may read it."""

    def get(self, adapter: AdapterId) -> PackedAdapter | None:
        """The adapter if it is in host memory."""
        packed = self._cache.get(adapter)
        if packed is not None:
            self._cache.move_to_end(adapter)
        return packed

    @property
    def room(self) -> int:
        """How many adapters like the largest seen the cache can hold, at least 1: to load more ahead would thrash."""
        return max(1, self._capacity // self._largest) if self._largest else 1

    def request(self, adapter: AdapterId) -> None:
        """Start loading unless it is under way."""
        if adapter in self._pending:
            return
        future = self._pending[adapter] = self._workers.submit(self._load, adapter)
        future.add_done_callback(lambda done: self._finished(adapter, done))

    def _finished(self, adapter: AdapterId, done: Future[PackedAdapter]) -> None:
        self._arrived.put((adapter, done))
        self._wake()

    def collect(self) -> dict[AdapterId, BaseException]:
        """Take in what has arrived; returns what could not be loaded, and why."""
        failures: dict[AdapterId, BaseException] = {}
        while not self._arrived.empty():
            adapter, done = self._arrived.get()
            if self._pending.get(adapter) is not done:
                continue  # dropped since; whoever wants it now has asked again
            del self._pending[adapter]
            error = done.exception()
            if error is not None:
                failures[adapter] = error
            else:
                self._insert(adapter, done.result())
        return failures

    def _insert(self, adapter: AdapterId, packed: PackedAdapter) -> None:
        self.drop(adapter)
        self._cache[adapter] = packed
        self._bytes += packed.nbytes
        self._largest = max(self._largest, packed.nbytes)
        while self._bytes > self._capacity and len(self._cache) > 1:
            self.drop(next(iter(self._cache)))
        self.host = frozenset(self._cache)

    def drop(self, adapter: AdapterId) -> None:
        """Forget an adapter if it is here or on its way."""
        self._pending.pop(adapter, None)
        packed = self._cache.pop(adapter, None)
        if packed is not None:
            self._bytes -= packed.nbytes
            self.host = frozenset(self._cache)

    def close(self) -> None:
        """Stop the workers; what is under way ends, what waits is cancelled."""
        self._workers.shutdown(cancel_futures=True)
