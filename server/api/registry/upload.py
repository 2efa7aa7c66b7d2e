"""Receive an adapter as a multipart form (RFC 7578). Files are written to disk while they are received."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request

from adapters.errors import AdapterError, AdapterRejected, printable
from adapters.format.archive import PACK_LESS, max_bytes, unpack
from adapters.format.files import FILES, MAX_FILES, MAX_JSON_BYTES, WEIGHTS
from adapters.format.foreign_formats import recognise
from adapters.format.selection import Selection, normalise_path, reject_path, select
from adapters.format.training_record import MAX_BYTES, SHOWN
from adapters.store.store import translate_disk_full
from server.errors import InvalidRequest, UploadTooLarge

MAX_FIELDS = 16
MAX_FIELD_BYTES = 64 << 10
"""Maximum size of a field. Enough for the names of a hundred skipped files."""
BATCH_BYTES = 1 << 20
"""Number of bytes to buffer before a thread parses and writes them."""
STALL_SECONDS = 60.0
"""Maximum time between two chunks of an upload."""
UPLOAD_SECONDS = 3600.0
"""Maximum duration of an upload."""

_ARCHIVE = re.compile(r".*\.(tar\.gz|tgz|tar|zip)", re.IGNORECASE | re.DOTALL)
_RECEIVED = ".received"
"""Sub-folder of the staging folder for received files, until it is known which of them belong to the adapter."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Upload:
    """A received form. The adapter's files are in the staging folder."""

    fields: Mapping[str, str]
    selection: Selection
    """Which of the received files are the adapter's, and which were skipped."""


async def receive(request: Request, staging: Path, limit: int) -> Upload:
    """Receive an adapter's files, or one archive of them, into the empty folder ``staging``.

    Files are identified by their filenames, which may include folders; files that do not belong to an adapter are
    skipped. Fields may come before or after files. ``limit`` is the maximum size of the weights in bytes.

    Raises AdapterRejected for a file, InvalidRequest for a field, UploadTooLarge, StoreFull, HTTPException (400 for a
    malformed form, 408 for a stalled one) and ClientDisconnect. ``staging`` may then contain partial files: delete it.
    """
    form = _Form(staging, limit)
    parser = _parser(request, form)
    body = _within(request, max_bytes(limit))
    try:
        with translate_disk_full(), closing(form):
            await _feed(parser, body)
            return Upload(form.fields, await _on_thread(form.finish))
    except (AdapterError, InvalidRequest, HTTPException):
        # Most clients read the response only after they have sent the whole body.
        with suppress(HTTPException):
            async for _ in body:
                pass
        raise


def _parser(request: Request, form: "_Form") -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _malformed("its Content-Type is not multipart/form-data with a boundary")
    with _parser_errors_as_400():
        return MultipartParser(
            boundary,
            {
                "on_part_begin": form.begin_part,
                "on_header_field": form.add_header_name,
                "on_header_value": form.add_header_value,
                "on_header_end": form.end_header,
                "on_headers_finished": form.open_part,
                "on_part_data": form.add_data,
                "on_part_end": form.end_part,
                "on_end": form.end,
            },
        )


async def _within(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body's chunks. Raises UploadTooLarge after ``limit`` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    left = limit
    async for chunk in within_time(request.stream()):
        left -= len(chunk)
        if left < 0:
            raise _too_large(limit)
        yield chunk


async def within_time(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the same chunks. Raise HTTPException 408 if the client stalls, so that its files do not stay for ever."""
    clock = asyncio.get_running_loop().time
    end = clock() + UPLOAD_SECONDS
    while True:
        try:
            async with asyncio.timeout_at(min(clock() + STALL_SECONDS, end)):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise HTTPException(408, "The upload stalled or took too long.") from error
        if chunk is None:
            return
        yield chunk


async def _feed(parser: MultipartParser, body: AsyncIterator[bytes]) -> None:
    """Send the body through the parser on threads, in batches of ``BATCH_BYTES``."""

    def parse(batch: bytes) -> None:
        with _parser_errors_as_400():
            parser.write(batch)

    gathered = bytearray()
    async for chunk in body:
        gathered += chunk
        if len(gathered) >= BATCH_BYTES:
            await _on_thread(partial(parse, bytes(gathered)))
            gathered.clear()
    await _on_thread(partial(parse, bytes(gathered)))


async def _on_thread(work: Callable[[], T]) -> T:
    """Run blocking work on a thread. Wait for its end even if cancelled, because its folder is deleted next."""
    running = asyncio.ensure_future(run_in_threadpool(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.gather(running, return_exceptions=True)
        raise


@dataclass(slots=True)
class _Part:
    name: str
    """Name of a field, or filename of a file."""
    writer: BinaryIO
    limit: int
    """Maximum size in bytes."""
    is_file: bool
    size: int = 0
    shown: Path | None = None
    """Where a file is written that is only shown. Such a file is dropped, not refused, if it is too large."""


class _Form:
    """Callbacks for the parser: keep fields in memory and write files to ``staging``."""

    def __init__(self, staging: Path, limit: int) -> None:
        self.fields: dict[str, str] = {}
        self._staging = staging
        self._limit = limit
        self._received = staging / _RECEIVED
        self._paths: list[str] = []
        """Filenames of all files so far. A file is stored under its index in this list."""
        self._archive: str | None = None
        """Filename of the archive, if there is one."""
        self._headers: dict[str, bytes] = {}
        self._name, self._value = bytearray(), bytearray()
        """Name and value of the header that is being parsed."""
        self._part: _Part | None = None
        self._ended = False

    def begin_part(self) -> None:
        self._headers.clear()

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def open_part(self) -> None:
        """Decide from its headers whether the part is a field or a file."""
        kind, options = parse_options_header(self._headers.get("content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no Content-Disposition header of type form-data with a name")
        encoding = self._headers.get("content-transfer-encoding", b"binary").strip().lower()
        if encoding not in (b"binary", b"8bit", b"7bit"):
            raise _malformed("a part has a Content-Transfer-Encoding, which forms must not use")
        filename = options.get(b"filename")
        self._part = self._field(options[b"name"]) if filename is None else self._file(filename)

    def add_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        assert part is not None
        part.size += end - start
        if part.size > part.limit and part.shown is not None:
            part.writer.close()
            part.shown.unlink()
            (part.writer, part.limit), part.shown = self._nowhere(), None
        if part.size > part.limit:
            if part.is_file:
                raise AdapterRejected(f"is larger than {part.limit} bytes", file=printable(part.name))
            raise InvalidRequest(f"The field is longer than {MAX_FIELD_BYTES} bytes.", param=printable(part.name))
        part.writer.write(memoryview(data)[start:end])

    def end_part(self) -> None:
        part, self._part = self._part, None
        assert part is not None
        if isinstance(part.writer, BytesIO):
            self.fields[part.name] = _text(part.writer.getvalue(), part.name)
        part.writer.close()

    def end(self) -> None:
        self._ended = True

    def finish(self) -> Selection:
        """Move the adapter's files into the staging folder and delete all others. Call after the end of the body."""
        if not self._ended:
            raise _malformed("it ends before its last boundary")
        selection = self._take() if self._archive is None else self._unpack(self._archive)
        shutil.rmtree(self._received)
        return selection

    def _take(self) -> Selection:
        if len(self._paths) == 1 and self._paths[0] not in FILES and recognise(self._paths) is None:
            reason = f"is neither one of an adapter's files ({', '.join(FILES)}) nor a .tar.gz, .tgz, .tar or .zip"
            reject_path(self._paths[0], reason)
        selection = select(self._paths)
        for number, path in enumerate(self._paths):
            folder, _, name = path.rpartition("/")
            received = self._received / str(number)
            if folder == selection.folder and (name in FILES or (name in SHOWN and received.exists())):
                received.rename(self._staging / name)
        return selection

    def _unpack(self, name: str) -> Selection:
        try:
            return unpack(self._received / "0", self._staging, self._limit)
        except AdapterRejected as error:
            raise AdapterRejected(error.reason, file=error.file or printable(name), code=error.code) from error

    def close(self) -> None:
        """Close a file that is still open."""
        if self._part is not None:
            self._part.writer.close()

    def _field(self, name: bytes) -> _Part:
        text = _text(name, printable(name.decode("utf-8", "replace")))
        if text in self.fields:
            raise InvalidRequest("The field occurs twice in the form.", param=printable(text))
        if len(self.fields) == MAX_FIELDS or len(name) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"A form has at most {MAX_FIELDS} fields.", param=printable(text))
        return _Part(text, BytesIO(), MAX_FIELD_BYTES, is_file=False)

    def _file(self, filename: bytes) -> _Part:
        path = normalise_path(filename.decode("utf-8", "replace"))
        packed = _ARCHIVE.fullmatch(path) is not None
        if not path:
            raise AdapterRejected("the form has a file without a name")
        if self._archive is not None or (packed and self._paths):
            reject_path(path, "comes with other files: send an adapter's files or one archive")
        if len(self._paths) == MAX_FILES:
            raise AdapterRejected(f"the form has more than {MAX_FILES} files: send only {', '.join(FILES)}")
        self._paths.append(path)
        if packed:
            self._archive = path
        name = path.rpartition("/")[2]
        part = _Part(path, *self._destination(name, packed), is_file=True)
        if name in SHOWN:
            part.shown = self._received / str(len(self._paths) - 1)
        return part

    def _destination(self, name: str, packed: bool) -> tuple[BinaryIO, int]:
        """Return where to write the latest file, and its maximum size. Files that no adapter has are discarded."""
        if not packed and name not in (*FILES, *SHOWN):
            return self._nowhere()
        plain = self._limit if name == WEIGHTS else MAX_BYTES.get(name, MAX_JSON_BYTES)
        limit = max_bytes(self._limit) if packed else plain
        self._received.mkdir(exist_ok=True)
        return (self._received / str(len(self._paths) - 1)).open("xb"), limit

    def _nowhere(self) -> tuple[BinaryIO, int]:
        """Return where to write a file that is discarded."""
        return Path(os.devnull).open("wb"), max_bytes(self._limit)


@contextmanager
def _parser_errors_as_400() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise _malformed(str(error)) from error


def _too_large(limit: int) -> UploadTooLarge:
    return UploadTooLarge(f"The upload is larger than {limit} bytes: {PACK_LESS}.")


def _malformed(reason: str) -> HTTPException:
    return HTTPException(400, f"The body cannot be read as a form: {reason}.")


def _text(data: bytes, field: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("The field is not valid UTF-8.", param=printable(field)) from error
