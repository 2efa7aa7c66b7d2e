"""Exchange: a request on its way to the application in a replica, and the application's answer on its way back.

The gateway sends a :class:`Call` with the request's head and, if it is small, its body. A body that is not in the call
comes in :class:`Feed` s once the application asks for it, so that it has rejected a bad key before, and reads a large
upload no faster than it can write it.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Scope

NEEDS_BODY = "manylora.needs_body"
"""Type of the message with which a replica asks for the body that its call lacks; it names ``replica`` and ``call``."""
END_SECONDS = 5.0
"""Seconds that the application gets to notice that its client has gone, before its task is cancelled."""
_CARRIED = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers"),
    *("client", "server"),
)
DISCONNECT: Message = {"type": "http.disconnect"}


@dataclass(frozen=True, slots=True)
class Call:
    """A request."""

    scope: dict[str, Any]
    """The part of ASGI's scope that can be sent to another process."""
    body: bytes | None
    """None: the replica asks for it when it wants it."""
    contents: tuple[str, ...] = ()
    """Contents of the adapters that it needs, for the router."""


@dataclass(frozen=True, slots=True)
class Feed:
    """A message for the application that runs a call."""

    replica: str
    call: str
    message: Message


def portable(scope: Scope) -> dict[str, Any]:
    """Return the part of a scope that a :class:`Call` carries."""
    return {name: scope[name] for name in _CARRIED if name in scope}


class Inbox:
    """What the application of one call receives: its body, then that the client has gone."""

    def __init__(self, call: Call) -> None:
        self._fed: Message | None = None
        """A message that was fed, until the application takes it."""
        self._changed = asyncio.Event()
        """Set whenever ``_fed``, ``complete`` or ``gone`` has changed."""
        self.complete = call.body is not None
        """Whether the body needs no feeding any more."""
        self._first = call.body
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        """Return the next message, as ASGI's ``receive``."""
        if self._first is not None:
            body, self._first = self._first, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.complete:
            await self.gone.wait()
            return DISCONNECT
        while (message := self._fed) is None:
            await self._change()
            if self.gone.is_set():
                return DISCONNECT
        self._fed = None
        self._changed.set()
        if message["type"] == "http.disconnect":
            self.gone.set()
        self.complete = self.gone.is_set() or not message.get("more_body", False)
        return message

    async def feed(self, message: Message) -> None:
        """Add a message; wait until the application has taken the one before. If the client has gone, do nothing."""
        while self._fed is not None and not self.gone.is_set():
            await self._change()
        if not self.gone.is_set():
            self._fed = message
            self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def disconnect(self) -> None:
        """Tell the application that the client has gone, and end the wait of a feed."""
        self.gone.set()
        self.complete = True
        self._fed = None
        self._changed.set()


class Calls:
    """Runs calls on the application of one replica, on one event loop."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self._app = app
        self.replica = replica
        """The replica's id, which its feeds name."""
        self._fed: dict[str, Inbox] = {}
        """The calls that wait for a body."""

    async def run(self, call: Call) -> AsyncIterator[list[Message]]:
        """Yield the messages that the application sends, all that there are at a time.

        Closing or cancelling this disconnects the client. Raises what the application raises.
        """
        inbox, outbox, id_ = Inbox(call), Outbox(), uuid4().hex

        async def receive() -> Message:
            if not inbox.complete and id_ not in self._fed:
                self._fed[id_] = inbox
                await outbox.send({"type": NEEDS_BODY, "replica": self.replica, "call": id_})
            return await inbox.receive()

        scope = {**call.scope, "state": {"abort": inbox.disconnect}}  # as ClientProtocol gives it
        working = asyncio.ensure_future(self._app(scope, receive, outbox.send))
        working.add_done_callback(lambda _: outbox.wake())
        try:
            while messages := await outbox.take(working):
                yield messages
            await working
        finally:
            self._fed.pop(id_, None)
            inbox.disconnect()
            await end(working)

    async def feed(self, feed: Feed) -> None:
        """Hand a message to its call, and wait until the application has room for it. One that has ended gets none."""
        inbox = self._fed.get(feed.call)
        if inbox is not None:
            await inbox.feed(feed.message)

    async def whole(self, call: Call) -> list[Message]:
        """Return all messages of an answer."""
        return [message async for messages in self.run(call) for message in messages]


class Outbox:
    """What the application of one call has sent and nobody has taken."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._filled = asyncio.Event()

    async def send(self, message: Message) -> None:
        """Add a message, as ASGI's ``send``."""
        self._messages.append(message)
        self._filled.set()

    def wake(self) -> None:
        """Let :meth:`take` look again."""
        self._filled.set()

    async def take(self, working: "asyncio.Future[None]") -> list[Message]:
        """Wait for messages and return them all; none when ``working``, which sends them, has ended."""
        while not self._messages and not working.done():
            self._filled.clear()
            await self._filled.wait()
        messages, self._messages = self._messages, []
        return messages


async def end(working: "asyncio.Future[None]") -> None:
    """Wait for the task, whose client has gone; cancel it after :data:`END_SECONDS`."""
    if not working.done():
        await asyncio.wait((working,), timeout=END_SECONDS)
    if not working.done():
        working.cancel()
        await asyncio.wait((working,))
    if not working.cancelled():
        working.exception()  # it has been raised already, or nobody is left to hear of it
