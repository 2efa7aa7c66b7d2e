"""HalfCloseProtocol: serve clients that close only the sending side of their connection.

A client that has sent its request may shut down its sending side (``shutdown(SHUT_WR)``, ``nc -N``) and still expect a
response; a client that gives up closes its socket. Both look the same at first: the server receives a FIN, and plain
uvicorn treats either as a disconnect. The difference shows when the server sends something, because the host of a
closed socket replies with a reset. A stream sends something with every token. A full response would send nothing until
it is complete, and would be computed to its end for a client that has left. Therefore, after a FIN, this protocol
sends the first bytes of the response early, one at each poll: ``HTTP/1.1`` and a space, with which every response
begins. Interim responses (``102 Processing``) would serve the same purpose, but HTTP/1.0 does not have them and not all
clients accept them.

TLS has no such half: a client that ends its side ends the connection.

Costs: a client that leaves is noticed a tenth of a second after its FIN and not at once. The bytes are used up after
26 s; from then on TCP keep-alive probes detect a client that has left, up to a minute late. Behind a proxy that
forwards the client's FIN but keeps its own socket open, a full response is computed to its end.
"""

import select
import socket
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.http.errors import JsonResponse, error_object
from server.api.protocol.request_head import StrictConnection

FIRST_BYTES = b"HTTP/1.1 "
"""The first bytes of every response. Each poll of a half-closed connection sends one of them."""
FIRST_POLL = 0.1
"""Seconds between the first and the second poll. Each pause is twice the previous one."""
LONGEST_PAUSE = 15
"""Maximum number of seconds between polls, and between TCP keep-alive probes."""


class HalfCloseProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, but a half-closed connection stays open until its responses are sent."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn: _H11Connection = _H11Connection()
        self._half_closed = False

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to keep the connection open: its request is complete, and its response is not.

        asyncio calls this again for the same FIN whenever reading resumes, for example between pipelined requests.
        """
        already, self._half_closed = self._half_closed, self.scheme == "http" and self._response_due()
        if self._half_closed and not already:
            _enable_keep_alive(self.transport.get_extra_info("socket"))
            self._poll(FIRST_POLL)
        return self._half_closed

    def on_response_complete(self) -> None:
        """Close a half-closed connection after its last response. Requests received before the FIN are all served."""
        super().on_response_complete()
        if self._half_closed and not self._response_due():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Respond to what is not HTTP, or is refused before the application sees it, and close the connection."""
        self.refuse(*(self.conn.refused or (400, msg)))

    def refuse(self, status: int, message: str) -> None:
        """Respond in the format of all other errors, and close the connection.

        Without a response if one is being sent already: the connection is then closed within it.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = uuid4().hex
            headers = {"connection": "close", "x-request-id": request_id, "x-content-type-options": "nosniff"}
            body = JsonResponse(error_object(status, message), status, headers)
            head = h11.Response(status_code=status, headers=body.raw_headers, reason=HTTPStatus(status).phrase.encode())
            for event in (head, h11.Data(data=bytes(body.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self._note_refusal(status, message, request_id)
        self.transport.close()

    def _note_refusal(self, status: int, message: str, request_id: str) -> None:
        """Called when a request has been refused here."""

    def _response_due(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _poll(self, pause: float) -> None:
        """Abort the connection if the client reset it; otherwise send one byte, and poll again in ``pause`` seconds."""
        if self.transport.is_closing():
            return
        if _was_reset(self.transport.get_extra_info("socket")):
            self.transport.abort()
            return
        if not self.cycle.response_started:
            self.transport.write(self.conn.take_first_byte())
        self.loop.call_later(pause, self._poll, min(2 * pause, LONGEST_PAUSE))


class _H11Connection(StrictConnection):
    """h11's connection, but the first bytes of a response can be sent before the response is known."""

    _sent = 0

    def take_first_byte(self) -> bytes:
        """Return the next of the first bytes; empty when all have been sent."""
        self._sent += 1
        return FIRST_BYTES[self._sent - 1 : self._sent]

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Return the data to send for ``event``, without the bytes already sent."""
        data = super().send_with_data_passthrough(event)
        if data and isinstance(event, h11.Response | h11.InformationalResponse):
            assert data[0].startswith(FIRST_BYTES)
            data[0] = data[0][min(self._sent, len(FIRST_BYTES)) :]
            self._sent = 0
        return data


def _was_reset(connection: socket.socket) -> bool:
    """Whether the client reset the connection. poll() reports that even with an empty event mask."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _enable_keep_alive(connection: socket.socket) -> None:
    """Let the kernel probe whether the client's socket still exists."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LONGEST_PAUSE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LONGEST_PAUSE)
