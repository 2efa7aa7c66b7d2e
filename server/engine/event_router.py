"""EventRouter: passes events from the engine's thread to the requests that wait for them."""

import asyncio
from collections.abc import Iterable
from concurrent.futures import Future

from server.engine.sequence import Event, Failed
from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineError,
    GrammarTooComplex,
    OutOfMemory,
    PoisonedRequest,
    RequestError,
)


class EventQueue:
    """The events of the sequences of one request, in order. For the event loop only."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    def wake(self) -> None:
        """Let ``take`` return, even without an event."""
        self._arrived.set()

    async def take(self) -> list[Event]:
        """Wait for an event or a call of ``wake``, then return all events so far that were not taken."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


class EventRouter:
    """Open requests by sequence id; its length is the number of requests.

    Any thread may call ``expect`` and ``close``, the engine's thread calls ``deliver``; all else is for the event loop.
    """

    def __init__(self) -> None:
        self.draining = False
        """Whether new requests are refused, because the server shuts down. Any thread may set it."""
        self._queues: dict[str, EventQueue] = {}
        """Those of one request are one queue."""
        self._futures: dict[str, Future[Event]] = {}
        """Changed by several threads, with atomic dict operations only."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len({id(queue) for queue in list(self._queues.values())})  # a copy, for other threads may ask

    def bind(self) -> None:
        """Deliver to the running event loop. Call this before the first request is opened."""
        self._loop = asyncio.get_running_loop()

    def open(self, sequence_ids: Iterable[str]) -> EventQueue:
        """Return the queue of a new request with these sequences. Raises Draining if the server shuts down."""
        self.check_open()
        queue = EventQueue()
        self._queues.update(dict.fromkeys(sequence_ids, queue))
        return queue

    def expect(self, sequence_id: str) -> Future[Event]:
        """Return a future of the only event of a sequence with one token, for a thread that waits for it.

        Also possible while the server drains: such a sequence belongs to a request that was accepted before.
        """
        return self._futures.setdefault(sequence_id, Future())

    def close(self, *sequence_ids: str) -> None:
        """Drop all further events of these sequences."""
        for sequence_id in sequence_ids:
            self._queues.pop(sequence_id, None)
            self._futures.pop(sequence_id, None)

    def check_open(self) -> None:
        """Raise Draining if no new requests are accepted."""
        if self.draining:
            raise Draining("The server is shutting down and takes no new requests.", code="draining")

    def error(self, failed: Failed) -> EngineError | RequestError:
        """The error of a request whose sequence has failed: Draining if that is because the server shuts down."""
        if failed.cause == "deadline":
            return DeadlineExceeded(failed.message, param="timeout", code="deadline_exceeded")
        if failed.cause == "grammar":
            return GrammarTooComplex(failed.message)
        if failed.cause == "request":
            return PoisonedRequest(failed.message)
        if failed.cause == "memory":
            return OutOfMemory(failed.message)
        return Draining(failed.message, code="draining") if self.draining else EngineError(failed.message)

    def fail_all(self, message: str) -> None:
        """Fail all open requests, without waiting for the engine. Later events of theirs are dropped."""
        for sequence_id, queue in list(self._queues.items()):
            queue.put(Failed(sequence_id, message))
        for sequence_id in list(self._futures):
            self._resolve(Failed(sequence_id, message))

    def deliver(self, events: list[Event]) -> None:
        """Pass on a step's events, from the engine's thread. Wakes the event loop once for all of them."""
        if self._futures:
            events = [event for event in events if not self._resolve(event)]
        if events:
            assert self._loop is not None, "bind() was not called before the first event"
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _resolve(self, event: Event) -> bool:
        future = self._futures.pop(event.sequence_id, None)
        if future is not None:
            future.set_result(event)
        return future is not None

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            # A request that has ended early (disconnect, stop string) may still get events.
            if (queue := self._queues.get(event.sequence_id)) is not None:
                queue.put(event)
