"""A server's adapters over HTTP: what the command line, and whoever publishes adapters, ask of it.

Errors::

    RemoteError
    ├── ServerRefused       the server understood and said no; or it failed, and said so
    └── ServerUnreachable   there was no answer: what was asked for may have happened or not
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx2

from adapters.cli.connection_errors import no_answer
from adapters.errors import AdapterRejected
from adapters.format.files import open_file, present, size_of
from adapters.format.selection import Selection, survey
from adapters.registry.names import check_name, parse_reference
from adapters.registry.snapshot import Target

Card = dict[str, Any]
"""What the server tells of an adapter or alias, as JSON."""
Progress = Callable[[int, int], None]
"""Called with the bytes sent so far, and all there are to send."""

PAGE = 500
"""Adapters asked for at a time."""
ADMISSION_SECONDS = 600.0
"""How long an upload's answer may take: the server checks all of it, and tries it between other requests."""

LEFT_OUT = "left_out"
"""The field of an upload that names what is in the folder and is not sent."""

_DROPPED = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)


class RemoteError(Exception):
    """The server did not do what it was asked."""


class ServerRefused(RemoteError):
    """The server's own words, its HTTP status, and its code for the reason where it gives one."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status = status
        self.message = message
        self.code = code
        super().__init__(message)


class ServerUnreachable(RemoteError):
    """No answer came from ``url``."""

    def __init__(self, url: str, error: httpx2.RequestError) -> None:
        self.url = url
        super().__init__(no_answer(url, error))


@dataclass(frozen=True, slots=True)
class Listing:
    """All the adapters of a server."""

    adapters: list[Card]
    refused: list[Card]
    """What the watched folder has that cannot be served: name, source, reason and since when."""
    store: Card
    """Bytes the adapters take, and may take."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """An adapter that the server has taken."""

    card: Card
    version: int
    new: bool
    """False where this content already was a version of this name."""
    selection: Selection
    """What of the folder has been left out."""


class AdapterClient:
    """The adapters of the server at ``url``.

    Its methods raise :class:`RemoteError`, and for what no name can be :class:`~adapters.errors.AdapterNameError` or
    :class:`~adapters.errors.UnknownAdapter`. Looking is tried once more where a connection drops; nothing else is.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        """Connects at the first question. ``timeout`` is in seconds without any progress.

        Raises ValueError for an address or a key that cannot be one.
        """
        address = _address(url)
        self.url = str(address.copy_with(username=None, password=None)).rstrip("/")
        self._timeout = timeout
        self._http = httpx2.Client(base_url=address, headers=_headers(api_key), timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def list(self) -> Listing:
        """Every adapter, in the order of their names."""
        pages = self._pages("/v1/adapters")
        cards = [card for page in pages for card in page["data"]]
        return Listing(cards, pages[-1]["refused"], pages[-1]["store"])

    def show(self, reference: str) -> Card:
        """An adapter (``legal``) or one of its versions (``legal@2``), with the receipt of its checks."""
        return self._ask("GET", _adapter(reference))

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
        """Upload the adapter in ``folder`` as the next version of ``name``, file by file as they are read.

        ``pinned`` None leaves the name as it is. Raises :class:`~adapters.errors.AdapterRejected`, before anything is
        sent, for a folder that holds no adapter. What else is in it is not sent; the receipt names it.
        """
        check_name(name)
        selection = survey(folder)
        flags = {
            "activate": activate,
            "pinned": pinned,
            "preload": preload,
            "allow_base_mismatch": allow_base_mismatch,
            # Left out where it is not wanted: a server of an older release does not know it.
            "allow_unknown_fields": allow_unknown_fields or None,
        }
        fields = {"name": name} | {key: str(value).lower() for key, value in flags.items() if value is not None}
        response = self._upload(folder, fields | _left_out(selection), progress)
        if _does_not_know(response, LEFT_OUT):
            # Of an older release: it has registered nothing, and its receipts do not name what was left out.
            response = self._upload(folder, fields, progress)
        card = _object(response)
        return Pushed(card, card["version"], response.status_code == httpx2.codes.CREATED, selection)

    def pin(self, name: str, pinned: bool) -> Card:
        """Keep the adapter on the device, or let it go when others need the place."""
        return self._ask("POST", f"{_adapter(name)}/pin", json={"pinned": pinned})

    def activate(self, name: str, version: int) -> Card:
        """Let ``name`` mean this one of its versions."""
        return self._ask("POST", f"{_adapter(name)}/activate", json={"version": version})

    def remove(self, reference: str) -> None:
        """Forget an adapter, or one of its versions."""
        self._ask("DELETE", _adapter(reference))

    def aliases(self) -> Sequence[Card]:
        """Every alias, in the order of their names."""
        return [card for page in self._pages("/v1/aliases") for card in page["data"]]

    def put_alias(self, name: str, targets: Sequence[Target]) -> Card:
        """Let ``name`` mean these, whatever it meant before."""
        wanted = [{"adapter": target.reference, "weight": target.weight} for target in targets]
        return self._ask("PUT", _alias(name), json={"targets": wanted})

    def remove_alias(self, name: str) -> None:
        """Forget an alias; what it stood for stays."""
        self._ask("DELETE", _alias(name))

    def _upload(self, folder: Path, fields: Mapping[str, str], progress: Progress | None) -> httpx2.Response:
        timeout = httpx2.Timeout(self._timeout, read=max(self._timeout, ADMISSION_SECONDS))
        with ExitStack() as stack:
            files = [(part, stack.enter_context(open_file(folder, part))) for part in present(folder)]
            meter = _Meter(sum(size_of(file) for _, file in files), progress)
            parts = [("file", (part, _MeteredFile(file, part, meter))) for part, file in files]
            return self._send("POST", "/v1/adapters", data=fields, files=parts, timeout=timeout)

    def _pages(self, path: str) -> Sequence[Card]:
        """All pages of a list."""
        pages = [self._ask("GET", path, params={"limit": PAGE})]
        # A server that promises more after an empty page would be asked for ever.
        while pages[-1].get("has_more") and pages[-1]["data"]:
            last = pages[-1]["data"][-1]["id"]
            pages.append(self._ask("GET", path, params={"limit": PAGE, "after": last}))
        return pages

    def _ask(self, method: str, path: str, **content: Any) -> Card:
        return _object(self._send(method, path, **content))

    def _send(self, method: str, path: str, **content: Any) -> httpx2.Response:
        try:
            try:
                return self._http.request(method, path, **content)
            except _DROPPED:
                if method != "GET":
                    raise
                return self._http.request(method, path, **content)
        except httpx2.RequestError as error:
            raise ServerUnreachable(self.url, error) from error


@dataclass(slots=True)
class _Meter:
    """Bytes sent of all the files of an upload."""

    total: int
    report: Progress | None
    sent: int = 0

    def add(self, count: int) -> None:
        self.sent += count
        if self.report is not None:
            self.report(self.sent, self.total)


class _MeteredFile(io.FileIO):
    """Reads an open file that must stay as long as it is: its size is announced before it is sent."""

    def __init__(self, file: BinaryIO, name: str, meter: _Meter) -> None:
        super().__init__(file.fileno(), closefd=False)
        self._part = name
        self._meter = meter
        self._left = size_of(file)

    def read(self, size: int | None = -1, /) -> bytes:
        """As a file does; raises :class:`~adapters.errors.AdapterRejected` where the disk fails or the size changes."""
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
    """Whether the server refuses the request for nothing but this field of it."""
    if response.status_code != httpx2.codes.BAD_REQUEST:
        return False
    try:
        match response.json():
            case {"error": {"code": "unknown_parameter", "param": param}}:
                return bool(param == field)
    except ValueError:
        pass
    return False


def _left_out(selection: Selection) -> dict[str, str]:
    """The field for what is in a folder and is not sent."""
    if not selection.ignored_count:
        return {}
    left = {"files": selection.ignored, "count": selection.ignored_count, "adapters": selection.others}
    return {LEFT_OUT: json.dumps(left, ensure_ascii=False)}


def _address(url: str) -> httpx2.URL:
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{url!r} is not an address: {error}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"{url!r} is not an address like http://127.0.0.1:8000")
    return address


def _headers(api_key: str | None) -> dict[str, str]:
    if api_key is None:
        return {}
    # Told without the key: h11 would print it.
    if not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("the API key has characters that no header can carry")
    return {"Authorization": f"Bearer {api_key}"}


def _adapter(reference: str) -> str:
    """The path of an adapter or version. Names need no quoting; `..`, which would lead elsewhere, is in none."""
    parsed = parse_reference(reference)
    check_name(parsed.name)
    return f"/v1/adapters/{parsed}"


def _alias(name: str) -> str:
    check_name(name)
    return f"/v1/aliases/{name}"


def _object(response: httpx2.Response) -> Card:
    """The JSON object the server answered with."""
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
            return ServerRefused(status, message, None if code is None else str(code))
    # Not this server's words: a proxy before it, or something else that listens there.
    if response.has_redirect_location:
        return ServerRefused(status, f"{_place(response)} has moved to {response.headers['location']}")
    return ServerRefused(status, f"{response.request.method} {_place(response)} was refused without a reason")


def _place(response: httpx2.Response) -> httpx2.URL:
    """The address that was asked, without the password it may hold."""
    return response.url.copy_with(username=None, password=None)
