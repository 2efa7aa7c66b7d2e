"""HalfCloseProtocol: one client's, which may close its sending side and still get its answer.

A client that has sent its request may close only its sending side (``shutdown(SHUT_WR)``, ``nc -N``); one that has
left closes its socket. The server gets the same FIN from both, and uvicorn takes both for gone. The difference shows
when the server sends something: the host of a closed socket answers with a reset. A stream sends something with every
token. A whole answer sends nothing until it is complete, and would be computed to its end for a client that has left.
So after a FIN the first bytes of that answer are sent ahead, one at each look: ``HTTP/1.1`` and a space, with which
every answer begins. Interim answers (``102 Processing``) would do the same, but HTTP/1.0 has none, and not every client
takes them.

What that costs: a client that leaves is noticed a tenth of a second after its FIN instead of at once. The bytes are
spent after 26 s; from then on TCP's keep-alive asks, which a host goes on answering for a socket closed less than a
minute ago. Where a proxy passes on a client's FIN and keeps its own socket, a whole answer is computed to its end.
"""

import select
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

FIRST_BYTES = b"HTTP/1.1 "
"""Of every answer. There is a byte for each look at a client that has said it will send no more."""
FIRST_POLL = 0.1
"""Seconds to the second byte; each pause is twice the one before."""
LONGEST_PAUSE = 15
"""Seconds between looks when all bytes are spent, and TCP's own between its."""


class HalfCloseProtocol(H11Protocol):
    """uvicorn's, but half-closed connections are kept for as long as an answer is due on them."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn: _H11Connection = _H11Connection(h11.SERVER)
        self._half_closed = False

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays: its whole request is there, and its answer is not.

        Called again for the same FIN after each pause in reading, as between requests that came together.
        """
        known, self._half_closed = self._half_closed, self._due()
        if self._half_closed and not known:
            _ask_by_tcp(self.transport.get_extra_info("socket"))
            self._poll(FIRST_POLL)
        return self._half_closed

    def on_response_complete(self) -> None:
        """Close where no other request can come; those that came before the end are still answered."""
        super().on_response_complete()
        if self._half_closed and not self._due():
            self.transport.close()

    def _due(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _poll(self, pause: float) -> None:
        """Let go of a client that is gone; else send it a byte, and look again after ``pause`` seconds."""
        if self.transport.is_closing():
            return
        if _was_reset(self.transport.get_extra_info("socket")):
            self.transport.abort()
            return
        if not self.cycle.response_started:
            self.transport.write(self.conn.begin())
        self.loop.call_later(pause, self._poll, min(2 * pause, LONGEST_PAUSE))


class _H11Connection(h11.Connection):
    """h11's, but the first bytes of an answer may be taken before the answer is known."""

    _begun = 0

    def begin(self) -> bytes:
        """The next byte of the answer to come; none where all that is certain is gone."""
        self._begun += 1
        return FIRST_BYTES[self._begun - 1 : self._begun]

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """What is to be sent for ``event``, but for what was taken."""
        data = super().send_with_data_passthrough(event)
        if data and isinstance(event, h11.Response | h11.InformationalResponse):
            assert data[0].startswith(FIRST_BYTES)
            data[0] = data[0][min(self._begun, len(FIRST_BYTES)) :]
            self._begun = 0
        return data


def _was_reset(connection: socket.socket) -> bool:
    """Whether both ways are shut: a FIN shuts one, and errors are reported unasked."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _ask_by_tcp(connection: socket.socket) -> None:
    """Let the kernel find out, without a byte, whether the other side still has its socket."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LONGEST_PAUSE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LONGEST_PAUSE)
