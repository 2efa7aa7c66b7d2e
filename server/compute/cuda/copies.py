"""Adapters on their way to the device, beside the steps of others.

An adapter of an 8B model is some hundred copies of a few MB each. They are started by a thread of their own, because
starting them takes milliseconds of Python, and run on a stream of their own, because a copy from pinned memory needs no
processor of the GPU. Nobody waits for them but a step whose rows need what is copied, and that on the device.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class StreamCopy:
    """One adapter under way."""

    def __init__(self, written: "Future[torch.cuda.Event]") -> None:
        self._written = written

    @property
    def arrived(self) -> bool:
        """Whether all of it is there, or will never be: then :meth:`wait` says why."""
        return self._written.done() and (self._written.exception() is not None or self._written.result().query())

    @property
    def error(self) -> BaseException | None:
        """What went wrong with it, once that is known."""
        return self._written.exception() if self._written.done() else None

    def wait(self) -> None:
        """Let what the current stream is given from now on run after the copy. Raises what went wrong with it."""
        torch.cuda.current_stream().wait_event(self._written.result())


class StreamCopier:
    """A stream and a thread for copies to ``device``, done in the order they are started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "adapter-copies", torch.set_num_threads, (1,))

    def start(self, write: Callable[[], None]) -> StreamCopy:
        """Run ``write`` on the stream, after all that the caller's stream has been given."""
        before = torch.cuda.current_stream(self._device).record_event()
        return StreamCopy(self._thread.submit(self._write, write, before))

    def _write(self, write: Callable[[], None], before: torch.cuda.Event) -> torch.cuda.Event:
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            write()
            done: torch.cuda.Event = self._stream.record_event()
            return done

    def close(self) -> None:
        """Finish what is under way."""
        self._thread.shutdown()
