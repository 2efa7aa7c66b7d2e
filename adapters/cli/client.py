"""AdapterClient: manage a server's adapters over HTTP, for the command line and for publishing after training.

Errors::

    RemoteError
    ├── ServerRefused       the server answered with an error
    └── ServerUnreachable   there was no answer: the change may have been made or not
"""

import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx2

from adapters.cli.connection_errors import no_answer
from adapters.errors import AdapterRejected
from adapters.format.files import open_file, present, size_of
from adapters.format.selection import Selection, select_in_folder
from adapters.format.training_record import SHOWN, open_bounded, present_shown
from adapters.registry.names import check_name, parse_reference
from adapters.registry.snapshot import Target
from bases.errors import ManyloraError, one_line

JsonObject = dict[str, Any]
"""An adapter or alias, as the server's JSON."""
Progress = Callable[[int, int], None]
"""Called with (bytes sent, bytes in total)."""

PAGE = 500
"""Adapters or aliases per page of a list."""
ADMISSION_SECONDS = 600.0
"""Read timeout of an upload in seconds: the server verifies the content and dry-loads it between other requests."""

LEFT_OUT = "left_out"
"""The form field that names files in the folder that are not sent."""

_CONNECTION_LOST = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)


class RemoteError(ManyloraError):
    """The server did not do what was requested."""

    def terminal_lines(self) -> list[str]:
        """Return the message as one line: its words are the server's."""
        return [one_line(str(self))]


class ServerRefused(RemoteError):
    """The server's error message, the HTTP status, and the error code if there is one.

    ``retry_after``: in how many seconds the server may do it, if it says so.
    """

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: str | None = None) -> None:
        self.status = status
        self.message = message
        self.code = code
        self.retry_after = retry_after
        super().__init__(message)

    def terminal_lines(self) -> list[str]:
        """Return the server's words as one line, with the HTTP status and the code behind them."""
        place = f"{self.status}, {self.code}" if self.code else str(self.status)
        hint = f"; try again in {self.retry_after} s" if self.retry_after else ""
        return [one_line(f"{self} ({place}){hint}")]


class ServerUnreachable(RemoteError):
    """No answer came from ``url``."""

    def __init__(self, url: str, error: httpx2.RequestError) -> None:
        self.url = url
        super().__init__(no_answer(url, error))


@dataclass(frozen=True, slots=True)
class Listing:
    """All adapters of a server."""

    adapters: list[JsonObject]
    refused: list[JsonObject]
    """Folders of the watched folder that cannot be served: name, source, reason and since when."""
    store: JsonObject
    """Bytes that the adapters take, and the quota."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """The result of an upload."""

    adapter: JsonObject
    version: int
    new: bool
    """False if this content was already a version of this name."""
    selection: Selection
    """Which files of the folder were sent, and which were not."""


class AdapterClient:
    """The adapters of the server at ``url``.

    Methods raise :class:`RemoteError`, and for an invalid name :class:`~adapters.errors.AdapterNameError` or
    :class:`~adapters.errors.UnknownAdapter`. If a connection drops, a GET is retried once; nothing else is retried.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        """Connects with the first request. ``timeout``: seconds without any progress.

        Raises ValueError for an invalid address or API key.
        """
        address = server_address(url)
        self.url = str(address.copy_with(username=None, password=None)).rstrip("/")
        self._timeout = timeout
        self._http = httpx2.Client(base_url=address, headers=key_headers(api_key), timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def list(self) -> Listing:
        """Return all adapters, in the order of their names."""
        pages = self._pages("/v1/adapters")
        adapters = [item for page in pages for item in page["data"]]
        return Listing(adapters, pages[-1]["refused"], pages[-1]["store"])

    def show(self, reference: str) -> JsonObject:
        """Return an adapter (``legal``) or one version (``legal@2``), with the receipt of its checks."""
        return self._request_object("GET", _adapter(reference))

    def push(
        self,
        folder: Path,
        name: str,
        *,
        activate: bool = True,
        pinned: bool | None = None,
        preload: bool = False,
        allow_base_mismatch: bool = False,
        allow_unknown_fields: bool = False,
        progress: Progress | None = None,
    ) -> Pushed:
        """Upload the adapter in ``folder`` as the next version of ``name``; files are streamed from disk.

        ``pinned`` None keeps the name's setting. Raises :class:`~adapters.errors.AdapterRejected`, before anything is
        sent, if the folder holds no adapter. Of other files those that servers show are sent; the receipt names all.
        """
        check_name(name)
        selection = select_in_folder(folder)
        flags = {
            "activate": activate,
            "pinned": pinned,
            "preload": preload,
            "allow_base_mismatch": allow_base_mismatch,
            # Only sent if set: servers of older releases do not know the field.
            "allow_unknown_fields": allow_unknown_fields or None,
        }
        fields = {"name": name} | {key: str(value).lower() for key, value in flags.items() if value is not None}
        response = self._upload(folder, fields | _left_out(selection, present_shown(folder)), progress)
        if _does_not_know(response, LEFT_OUT):
            # A server of an older release, which has registered nothing: send it again without the field.
            response = self._upload(folder, fields, progress)
        answer = read_object(response)
        return Pushed(answer, answer["version"], response.status_code == httpx2.codes.CREATED, selection)

    def pin(self, name: str, pinned: bool) -> JsonObject:
        """Pin the adapter to the device, or unpin it."""
        return self._request_object("POST", f"{_adapter(name)}/pin", json={"pinned": pinned})

    def activate(self, name: str, version: int) -> JsonObject:
        """Make ``version`` the active version of ``name``."""
        return self._request_object("POST", f"{_adapter(name)}/activate", json={"version": version})

    def remove(self, reference: str) -> None:
        """Remove an adapter, or one of its versions."""
        self._request_object("DELETE", _adapter(reference))

    def aliases(self) -> Sequence[JsonObject]:
        """Return all aliases, in the order of their names."""
        return [item for page in self._pages("/v1/aliases") for item in page["data"]]

    def put_alias(self, name: str, targets: Sequence[Target]) -> JsonObject:
        """Create or replace the alias ``name``."""
        wanted = [{"adapter": target.reference, "weight": target.weight} for target in targets]
        return self._request_object("PUT", _alias(name), json={"targets": wanted})

    def remove_alias(self, name: str) -> None:
        """Remove an alias; its targets stay."""
        self._request_object("DELETE", _alias(name))

    def items(self, path: str, wanted: JsonObject, last: int | None = None) -> Sequence[JsonObject]:
        """Return the items of any list, ``last`` of them at most. ``wanted``: parameters of the query."""
        pages = self._pages(path, wanted, last)
        return [item for page in pages for item in page["data"]][:last]

    def metrics(self) -> str:
        """Return the server's metrics, in Prometheus' text format."""
        response = self._send("GET", "/metrics")
        if not response.is_success:
            read_object(response)  # raises ServerRefused
        return response.text

    def _upload(self, folder: Path, fields: Mapping[str, str], progress: Progress | None) -> httpx2.Response:
        timeout = httpx2.Timeout(self._timeout, read=max(self._timeout, ADMISSION_SECONDS))
        with ExitStack() as stack:
            files = [(part, stack.enter_context(open_file(folder, part))) for part in present(folder)]
            shown = ((part, open_bounded(folder, part)) for part in SHOWN)
            files += [(part, stack.enter_context(file)) for part, file in shown if file is not None]
            meter = _Meter(sum(size_of(file) for _, file in files), progress)
            parts = [("file", (part, _MeteredFile(file, part, meter))) for part, file in files]
            return self._send("POST", "/v1/adapters", data=fields, files=parts, timeout=timeout)

    def _pages(self, path: str, wanted: JsonObject | None = None, last: int | None = None) -> Sequence[JsonObject]:
        """Return all pages of a list, or those that have its first ``last`` items."""
        query = {**(wanted or {}), "limit": PAGE if last is None else min(last, PAGE)}
        pages = [self._request_object("GET", path, params=query)]
        # Stop at an empty page, although the server says there are more.
        while pages[-1].get("has_more") and pages[-1]["data"] and (last is None or len(pages) * query["limit"] < last):
            after = pages[-1]["data"][-1]["id"]
            pages.append(self._request_object("GET", path, params={**query, "after": after}))
        return pages

    def _request_object(self, method: str, path: str, **content: Any) -> JsonObject:
        return read_object(self._send(method, path, **content))

    def _send(self, method: str, path: str, **content: Any) -> httpx2.Response:
        try:
            try:
                return self._http.request(method, path, **content)
            except _CONNECTION_LOST:
                if method != "GET":
                    raise
                return self._http.request(method, path, **content)
        except httpx2.RequestError as error:
            raise ServerUnreachable(self.url, error) from error


@dataclass(slots=True)
class _Meter:
    """Counts the bytes sent of all files of an upload."""

    total: int
    report: Progress | None
    sent: int = 0

    def add(self, count: int) -> None:
        self.sent += count
        if self.report is not None:
            self.report(self.sent, self.total)


class _MeteredFile(io.FileIO):
    """Reads an open file whose size must not change: it is sent in the Content-Length before the file is."""

    def __init__(self, file: BinaryIO, name: str, meter: _Meter) -> None:
        super().__init__(file.fileno(), closefd=False)
        self._part = name
        self._meter = meter
        self._left = size_of(file)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does. Raises :class:`~adapters.errors.AdapterRejected` if that fails or the size changes."""
        try:
            chunk = super().read(-1 if size is None else size)
        except OSError as error:
            raise AdapterRejected(f"cannot be read: {error.strerror}", file=self._part) from error
        self._left -= len(chunk)
        if self._left < 0 or (self._left and not chunk):
            raise AdapterRejected("changed while it was read", file=self._part)
        if chunk:
            self._meter.add(len(chunk))
        return chunk


def _does_not_know(response: httpx2.Response, field: str) -> bool:
    """Return whether the server refuses the request only because it does not know ``field``."""
    if response.status_code != httpx2.codes.BAD_REQUEST:
        return False
    try:
        match response.json():
            case {"error": {"code": "unknown_parameter", "param": param}}:
                return bool(param == field)
    except ValueError:
        pass
    return False


def _left_out(selection: Selection, sent: Collection[str]) -> dict[str, str]:
    """Return the form field that names what is not sent; empty if everything is. ``sent``: ignored files that are."""
    count = selection.ignored_count - len(sent)
    if not count:
        return {}
    ignored = [name for name in selection.ignored if name not in sent]
    left = {"files": ignored, "count": count, "adapters": selection.others}
    return {LEFT_OUT: json.dumps(left, ensure_ascii=False)}


def server_address(url: str) -> httpx2.URL:
    """Parse the address of a server. Raises ValueError."""
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{url!r} is not an address: {error}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"{url!r} is not an address like http://127.0.0.1:8000")
    return address


def key_headers(api_key: str | None) -> dict[str, str]:
    """Return the headers that carry an API key. Raises ValueError if none can."""
    if api_key is None:
        return {}
    # Checked here because h11's own message would print the key.
    if not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("the API key has characters that no header can carry")
    return {"Authorization": f"Bearer {api_key}"}


def _adapter(reference: str) -> str:
    """Return the path of an adapter or version. Valid names need no quoting and cannot contain `..`."""
    parsed = parse_reference(reference)
    check_name(parsed.name)
    return f"/v1/adapters/{parsed}"


def _alias(name: str) -> str:
    check_name(name)
    return f"/v1/aliases/{name}"


def read_object(response: httpx2.Response) -> JsonObject:
    """Return the response's JSON object. Raises ServerRefused for an error, or a server that is not manylora."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not response.is_success:
        raise _refusal(response, body)
    if not isinstance(body, dict) or "object" not in body:
        raise ServerRefused(response.status_code, f"{_place(response)} is answered by something that is no manylora")
    return body


def _refusal(response: httpx2.Response, body: Any) -> ServerRefused:
    status = response.status_code
    match body:
        case {"error": {"message": str(message), **rest}}:
            code = rest.get("code")
            retry_after = response.headers.get("retry-after", "")
            seconds = retry_after if retry_after.isdecimal() else None  # a proxy may send a date
            return ServerRefused(status, message, None if code is None else str(code), seconds)
    # Not an error of manylora's: a proxy in front of it, or another server.
    if response.has_redirect_location:
        return ServerRefused(status, f"{_place(response)} has moved to {response.headers['location']}")
    return ServerRefused(status, f"{response.request.method} {_place(response)} was refused without a reason")


def _place(response: httpx2.Response) -> httpx2.URL:
    """Return the URL of the request without its password."""
    return response.url.copy_with(username=None, password=None)
