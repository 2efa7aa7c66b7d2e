"""ClientProtocol: end connections whose clients are too slow, or that are above the limits.

uvicorn limits only how long an idle connection stays open, and its clock stops with the first byte that comes. Here the
server looks at every connection once a second, which costs less than timers for each request. Bodies that the
application reads are limited in :mod:`server.api.http.body_limits`.
"""

import asyncio
import socket
import struct
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import h11

from server.api.protocol.half_close import HalfCloseProtocol
from server.api.telemetry.refusals import Refusals
from server.connections import Connection, Connections

REFUSED_SECONDS = 5.0
"""Time that a client has to send a request on a connection above the limits."""


@dataclass(frozen=True, slots=True)
class ClientTimeouts:
    """How long the server waits for a client, in seconds."""

    request: float
    """For a head, or for the rest of a body whose response has been sent."""
    write: float
    """Until the client reads more of what is sent."""


class ClientProtocol(HalfCloseProtocol):
    """uvicorn's HTTP/1.1 protocol for clients that may be slow, or too many.

    The state of its requests has ``abort``, a function that ends the connection at once, and ``refusal``, why the
    connection is above the limits, or None.
    """

    def __init__(
        self, *arguments: Any, connections: Connections, timeouts: ClientTimeouts, refusals: Refusals, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._connections = connections
        self._refusals = refusals
        self._timeouts = timeouts
        self._head_since: float | None = None
        """Since when the server waits for the rest of a head; None: the next one may begin whenever it likes."""
        self._answered = 0.0
        """When the last response was complete."""
        self._taken, self._taken_at = 0, monotonic()
        """Bytes that the client had taken, and when it last took some or nothing waited for it."""

    def connection_made(self, transport: Any) -> None:
        """Called when the connection is open; with TLS, after the handshake."""
        super().connection_made(transport)
        self._connection = self._connections.find(transport.get_extra_info("socket").fileno())
        self._refused = self._connection is not None and self._connection.refusal is not None
        self.app_state = {
            **self.app_state,
            # Not a method: this object, which has its last request, would refer to itself, and both would stay in
            # memory until Python looks for garbage.
            "abort": partial(_reset, transport, self._connection),
            "refusal": self._connection and self._connection.refusal,
        }
        self._head_since = monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is closed; ``exc``: why, unless one side did so in order."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn's timer would keep one that was reset, and its last request

    def data_received(self, data: bytes) -> None:
        """Called with what the client has sent."""
        if self._head_since is None and self.conn.their_state is h11.IDLE:
            self._head_since = monotonic()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Called when a response has been written."""
        self._head_since, self._answered = None, monotonic()
        super().on_response_complete()
        if self._refused:
            self.transport.close()

    def _note_refusal(self, status: int, message: str, request_id: str) -> None:
        self._refusals.note(status, message, request_id, self.client and self.client[0])

    def _should_upgrade(self) -> bool:
        """Whether to change to another protocol: never. uvicorn would log each request for it as a warning."""
        return False

    def check(self, now: float) -> None:
        """End the connection if its client is too slow. ``now``: the time by ``time.monotonic()``."""
        if self._is_stalled(now):
            _reset(self.transport, self._connection)
        elif self.transport.is_closing():
            return
        elif self._waits_for_head(now):
            if self.conn.head_begun:
                self.refuse(408, "The request's headers did not arrive in time.")
            else:
                self.transport.close()
        elif self._waits_for_discarded_body(now):
            self.transport.close()

    def _waits_for_head(self, now: float) -> bool:
        limit = min(self._timeouts.request, REFUSED_SECONDS) if self._refused else self._timeouts.request
        late = self._head_since is not None and now - self._head_since > limit
        return late and self.conn.their_state is h11.IDLE

    def _waits_for_discarded_body(self, now: float) -> bool:
        answered = self.cycle is not None and self.cycle.response_complete
        return answered and self.conn.their_state is h11.SEND_BODY and now - self._answered > self._timeouts.request

    @property
    def is_sending(self) -> bool:
        """Whether a response is not complete, or waits here for its client to read it."""
        answering = self.cycle is not None and not self.cycle.response_complete
        return answering or self.transport.get_write_buffer_size() > 0

    def _is_stalled(self, now: float) -> bool:
        """Whether something waits for the client, which has taken nothing for a while."""
        # With TLS, the transport's size leaves out what waits below it.
        writing = self.is_sending or self.scheme == "https"
        if self._connection is None or self._connection.fileno() < 0 or not writing:
            self._taken_at = now
            return False
        taken, waiting = self._connection.taken()
        if not waiting or taken > self._taken:
            self._taken, self._taken_at = taken, now
        return now - self._taken_at > self._timeouts.write


def _reset(transport: asyncio.WriteTransport, connection: Connection | None) -> None:
    """End a connection at once, and drop what waits for the client, also in the kernel."""
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
