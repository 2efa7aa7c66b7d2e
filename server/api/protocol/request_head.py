"""StrictConnection: limits of a request's head, and what two parsers may read differently.

A proxy and this server must agree on where a request ends. Where they do not, one client's bytes become another one's
request (request smuggling). h11 already refuses differing lengths, odd numbers and unknown transfer codings; refused
here are also a length beside a transfer coding, a transfer coding in HTTP/1.0, folded lines, and line breaks that are
not CRLF. A ``Host`` that is no host is refused because the rest of the URL is read from behind it.
"""

import re
from typing import Any

import h11

MAX_HEAD = 32 << 10
"""Bytes of the request line and all headers."""
MAX_HEADERS = 128

_END = re.compile(rb"\n\r?\n")
_ODD = re.compile(rb"(?<!\r)\n|\n[ \t]|\r(?!\n)|\0")
"""Line breaks other than CRLF, folded lines, NUL."""
_HOST = re.compile(rb"[A-Za-z0-9._~-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+(%25[A-Za-z0-9._~-]+)?\](:[0-9]*)?")


class HeadRefused(h11.RemoteProtocolError):
    """A head that is too large, or that others may read differently. Has an HTTP status."""


class StrictConnection(h11.Connection):
    """The server's end of an h11 connection, which refuses such heads with :class:`HeadRefused`."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=MAX_HEAD + 4)
        self.refused: tuple[int, str] | None = None
        """Status and reason once a head was refused; the connection then has no further requests.

        Not the error: its traceback refers to this object, and both would stay until Python looks for garbage.
        """

    def next_event(self) -> Any:
        """As in h11. Heads are looked at before h11 parses them, which takes time for each header."""
        try:
            if self.their_state is h11.IDLE:
                _check_lines(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_headers(event)
        except HeadRefused as error:
            self.refused = error.error_status_hint, str(error)
            raise
        return event

    @property
    def head_begun(self) -> bool:
        """Whether a part of a head has been received."""
        return self.their_state is h11.IDLE and bool(self.trailing_data[0])


def _check_lines(data: bytes) -> None:
    """Check the head at the beginning of ``data``, which may be incomplete."""
    end = _END.search(data, 0, MAX_HEAD)
    if end is None and len(data) > MAX_HEAD:
        raise HeadRefused(f"The request line and headers have more than {MAX_HEAD} bytes.", error_status_hint=431)
    head = data if end is None else data[: end.end()]
    if head.count(b"\n") > MAX_HEADERS + 2:  # the request line, and the empty line at the end
        raise HeadRefused(f"The request has more than {MAX_HEADERS} headers.", error_status_hint=431)
    if _ODD.search(head.removesuffix(b"\r")) is not None:
        raise HeadRefused("Lines of a request's head must end in CRLF and must not be folded.", error_status_hint=400)


def _check_headers(request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise HeadRefused("A request has `Content-Length` or `Transfer-Encoding`, not both.", error_status_hint=400)
        if request.http_version < b"1.1":
            raise HeadRefused("HTTP/1.0 has no `Transfer-Encoding`.", error_status_hint=400)
    for name, value in request.headers:
        if name == b"host" and _HOST.fullmatch(value) is None:
            raise HeadRefused("`Host` is no host.", error_status_hint=400)
