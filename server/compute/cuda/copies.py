"""Copies of adapters to the device, in the background of other requests' steps.

An adapter of an 8B model takes some hundred copies of a few MB each. A thread of their own starts them, because that
takes milliseconds of Python. They run on a stream of their own, because the copy engines of a GPU work beside its
kernels. Only a step that uses the adapter waits for them, and it waits on the device.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class StreamCopy:
    """The copy of one adapter. See :class:`server.compute.backend.AdapterCopy`."""

    def __init__(self, written: "Future[torch.cuda.Event]") -> None:
        self._written = written

    @property
    def arrived(self) -> bool:
        """Whether the copy is complete, or has failed: then :meth:`wait` raises."""
        return self._written.done() and (self._written.exception() is not None or self._written.result().query())

    @property
    def error(self) -> BaseException | None:
        """Why the copy failed, once that is known."""
        return self._written.exception() if self._written.done() else None

    def wait(self) -> None:
        """Make work queued on the current stream from now on run after the copy. Raises :attr:`error` if it failed."""
        torch.cuda.current_stream().wait_event(self._written.result())


class StreamCopier:
    """A stream and a thread for copies to ``device``, which run in the order in which they are started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "adapter-copies", torch.set_num_threads, (1,))

    def start(self, write: Callable[[], None]) -> StreamCopy:
        """Run ``write`` on the stream, after all work that is queued on the caller's stream."""
        before = torch.cuda.current_stream(self._device).record_event()
        return StreamCopy(self._thread.submit(self._write, write, before))

    def _write(self, write: Callable[[], None], before: torch.cuda.Event) -> torch.cuda.Event:
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            write()
            done: torch.cuda.Event = self._stream.record_event()
            return done

    def close(self) -> None:
        """Finish the copies that were started."""
        self._thread.shutdown()
