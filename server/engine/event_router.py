"""EventRouter: carries each step's events from the engine's thread to the requests that wait for them."""

import asyncio
from concurrent.futures import Future

from server.engine.sequence import Event
from server.errors import Draining


class EventQueue:
    """The events of one sequence, in order. Used on the event loop only."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def take(self) -> list[Event]:
        """Everything that has come; waits for the first."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


class EventRouter:
    """The open requests, by sequence id. Any thread may ``expect`` and ``close``; the rest, but for ``deliver``, is for
    the event loop's.
    """

    def __init__(self) -> None:
        self.draining = False
        """Whether new requests are turned away; any thread may set it."""
        self._inboxes: dict[str, EventQueue] = {}
        self._expected: dict[str, Future[Event]] = {}
        """Changed by several threads, in single steps only."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._inboxes)

    def bind(self) -> None:
        """Deliver to the event loop that runs now; before the first request is opened."""
        self._loop = asyncio.get_running_loop()

    def open(self, sequence_id: str) -> EventQueue:
        """Raises Draining."""
        self.check_open()
        return self._inboxes.setdefault(sequence_id, EventQueue())

    def expect(self, sequence_id: str) -> Future[Event]:
        """For a thread that waits for a sequence of one token, event loop or not: its only event.

        Also while the server drains: it belongs to something that was let in before.
        """
        return self._expected.setdefault(sequence_id, Future())

    def close(self, sequence_id: str) -> None:
        """Events of this sequence go nowhere from now on."""
        self._inboxes.pop(sequence_id, None)
        self._expected.pop(sequence_id, None)

    def check_open(self) -> None:
        """Raises Draining where nothing new is taken."""
        if self.draining:
            raise Draining("The server is shutting down and takes no new requests.", code="draining")

    def deliver(self, events: list[Event]) -> None:
        """For the engine's thread: wakes the event loop once, however many events a step has."""
        if self._expected:
            events = [event for event in events if not self._resolve(event)]
        if events:
            assert self._loop is not None, "events before the event loop"
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _resolve(self, event: Event) -> bool:
        future = self._expected.pop(event.sequence_id, None)
        if future is not None:
            future.set_result(event)
        return future is not None

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            # A request that ended early (disconnect, stop string) may have events under way.
            if (inbox := self._inboxes.get(event.sequence_id)) is not None:
                inbox.put(event)
