"""Gateway: the ASGI application behind Ray's proxy. It reads which adapter a request needs, and passes the request on.

It checks nothing: keys, limits, bodies and names are the replica's business, whose application is that of
``manylora serve``. Three things are done here, because a single replica cannot: a change is answered when all replicas
know of it, ``/metrics`` has the metrics of all of them, and a replica that dies becomes a 503.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from server.api.http.disconnect import wait_for_disconnect
from server.api.http.errors import error_object, respond
from server.ray import references
from server.ray.exchange import NEEDS_BODY, Call, Feed, portable
from server.ray.metrics_page import merged
from server.ray.references import References

CHANGING = ("/v1/adapters", "/v1/aliases", "/v1/keys", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Beginnings of the paths whose requests, unless they only read, change what all replicas share."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})
METRICS = "/metrics"
LOST = "The replica that served this request has ended. Please try again."
NO_METRICS = "No replica has answered with its metrics. Please try again."
FULL = "All replicas have as many requests as they can hold. Please try again."


class ReplicaLost(Exception):
    """The replica of a call has died, or could not be reached. Its text, if any, is for the client."""


class AllFull(Exception):
    """No replica takes another call."""


class Replicas(Protocol):
    """The way to the replicas."""

    def call(self, call: Call) -> AsyncIterator[list[Message]]:
        """Run a call on the replica that suits it best. Raises ReplicaLost or AllFull; closing it ends the call."""
        ...

    async def feed(self, feed: Feed) -> None:
        """Bring a message to a call. Raises ReplicaLost or AllFull."""
        ...

    async def everywhere(self, call: Call) -> dict[str, list[Message]]:
        """Run a call on each replica, and return the whole answers by replica. Those that have died have none."""
        ...

    async def refresh(self) -> None:
        """Return when all replicas know what is registered, and which keys are valid."""
        ...


class Gateway:
    """Passes requests to replicas and their answers back."""

    def __init__(
        self,
        replicas: Replicas,
        contents: Callable[[Sequence[str], str | None], tuple[str, ...]],
        refresh: Callable[[], Awaitable[None]],
        *,
        max_body: int,
        body_seconds: float,
        proxys_header: str = "",
    ) -> None:
        """``contents`` and ``refresh``: see :class:`~server.ray.names.Names`.

        Bodies of up to ``max_body`` bytes that come within ``body_seconds`` are read before a replica is chosen.
        ``proxys_header``: one that the proxy in front adds to each answer, so that the replica's is left out.
        """
        self._replicas = replicas
        self._contents = contents
        self._refresh = refresh
        self._max_body = max_body
        self._body_seconds = body_seconds
        self._proxys_header = proxys_header.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            # The rest of a body that was not read in time follows it, so the replica refuses it for its own reason.
            arrival = Arrival(scope, receive)
            await arrival.read(self._max_body, self._body_seconds)
            if not arrival.gone:
                await self._serve(scope, arrival, _Answer(send, self._proxys_header))

    async def _serve(self, scope: Scope, arrival: "Arrival", answer: "_Answer") -> None:
        named = references.of_body(arrival.body) if arrival.complete and arrival.body else References()
        named = named if named.names else references.of_path(scope["path"])
        call = Call(
            portable(scope),
            arrival.body if arrival.complete else None,
            self._contents(named.names, named.user) if named.names else (),
        )
        try:
            if scope["path"] == METRICS:
                await self._metrics(call, answer)
                return
            changing = scope["method"] not in READING and scope["path"].startswith(CHANGING)
            await self._pass_on(call, arrival, answer, self._spread if changing else None)
        except (ReplicaLost, AllFull) as error:
            if answer.started:
                raise  # the proxy cuts the connection: a client must not take half an answer for a whole one
            body = error_object(503, FULL if isinstance(error, AllFull) else str(error) or LOST)
            refusal = respond(503, body, retry={"retry-after": "1"}, path=scope["path"])
            await refusal(scope, arrival.receive, answer.send)

    async def _pass_on(
        self, call: Call, arrival: "Arrival", answer: "_Answer", before: Callable[[], Awaitable[None]] | None
    ) -> None:
        """Run a call; end it if the client goes. ``before`` runs before a successful answer begins."""
        stream = self._replicas.call(call)
        listening = asyncio.ensure_future(arrival.until_gone()) if arrival.complete else None
        coming: asyncio.Future[list[Message]] | None = None
        try:
            while True:
                coming = asyncio.ensure_future(_next(stream))
                waited = (coming,) if listening is None else (coming, listening)
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if listening is not None and not coming.done():
                    listening.result()  # the client has gone, unless this raises why the body could not be fed
                    return
                if not (messages := coming.result()):
                    return
                for message in messages:
                    if message["type"] == NEEDS_BODY:
                        listening = asyncio.ensure_future(self._feed(message["replica"], message["call"], arrival))
                        continue
                    if before is not None and message["type"] == "http.response.start" and message["status"] < 400:
                        await before()
                    await answer.send(message)
        finally:
            tasks = [task for task in (coming, listening) if task is not None]
            for task in tasks:
                task.cancel()
            # What one of them raises has been raised above, or comes after the end of the answer and changes nothing.
            await asyncio.gather(*tasks, return_exceptions=True)
            await stream.aclose()  # type: ignore[attr-defined]

    async def _feed(self, replica: str, call: str, arrival: "Arrival") -> None:
        """Feed the body to a call, then wait until the client has gone."""
        with suppress(ReplicaLost):  # the call itself says so
            while True:
                message = await arrival.receive()
                await self._replicas.feed(Feed(replica, call, message))
                if message["type"] == "http.disconnect":
                    return
                if not message.get("more_body", False):
                    break
        await arrival.until_gone()

    async def _spread(self) -> None:
        await asyncio.gather(self._replicas.refresh(), self._refresh())

    async def _metrics(self, call: Call, answer: "_Answer") -> None:
        """Send one page of all replicas' metrics; or, if one refuses, its refusal."""
        plain = [(name, value) for name, value in call.scope["headers"] if name != b"accept"]
        pages = await self._replicas.everywhere(Call({**call.scope, "headers": plain}, b""))
        if not pages:
            raise ReplicaLost(NO_METRICS)
        chosen = next((each for each in pages.values() if each[0]["status"] != 200), None)
        if chosen is None:
            chosen = next(iter(pages.values()))
            page = merged({replica: _body(messages).decode() for replica, messages in sorted(pages.items())}).encode()
            headers = [(name, value) for name, value in chosen[0]["headers"] if name != b"content-length"]
            headers.append((b"content-length", str(len(page)).encode()))
            body = b"" if call.scope["method"] == "HEAD" else page
            chosen = [{**chosen[0], "headers": headers}, {"type": "http.response.body", "body": body}]
        for message in chosen:
            await answer.send(message)


class Arrival:
    """A request whose body arrives."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._headers = Headers(scope=scope)
        self._messages: list[Message] = []
        """Received, and not taken by :meth:`receive`."""
        self.complete = False
        """Whether ``body`` is all of it."""
        self.gone = False
        """Whether the client has gone."""

    @property
    def body(self) -> bytes:
        """What :meth:`read` has read."""
        return b"".join(message.get("body", b"") for message in self._messages)

    async def read(self, most: int, seconds: float) -> None:
        """Read the body, unless it is a form, longer than ``most`` bytes, or late."""
        if self._headers.get("content-type", "").startswith("multipart/") or self._declared() > most:
            return
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while size <= most:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        self.gone = True
                        return
                    self._messages.append(message)
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        self.complete = size <= most
                        return

    def _declared(self) -> int:
        """The declared length; 0 if there is none, or it is no number."""
        declared = self._headers.get("content-length", "")
        return int(declared) if declared.isdecimal() else 0

    async def receive(self) -> Message:
        """Return the next message, those first that were read."""
        return self._messages.pop(0) if self._messages else await self._receive()

    async def until_gone(self) -> None:
        """Return when the client has gone."""
        await wait_for_disconnect(self._receive)


class _Answer:
    """The answer to the client."""

    def __init__(self, send: Send, proxys_header: bytes) -> None:
        self._send = send
        self._proxys_header = proxys_header
        self.started = False

    async def send(self, message: Message) -> None:
        """Send a message, with the header that the server process adds to each answer in ``manylora serve``."""
        if message["type"] == "http.response.start":
            self.started = True
            message["headers"] = [each for each in message.get("headers", ()) if each[0] != self._proxys_header]
            MutableHeaders(scope=message).setdefault("x-content-type-options", "nosniff")
        await self._send(message)


async def _next(stream: AsyncIterator[list[Message]]) -> list[Message]:
    """The next messages; none at the end."""
    return await anext(stream, [])


def _body(messages: Sequence[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages if message["type"] == "http.response.body")


async def _live(receive: Receive, send: Send) -> None:
    """Take part in ASGI's lifespan; there is nothing to do."""
    while (message := await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": f"{message['type']}.complete"})
