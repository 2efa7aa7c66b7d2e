"""Unpack an adapter from an untrusted archive.

Python's ``tarfile`` and ``zipfile`` parse the formats. Both keep the metadata of members in memory, so the file objects
they are given bound each read. Extracted bytes are counted, because the sizes that an archive declares may be wrong.
"""

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapters.errors import AdapterRejected
from adapters.format.files import FILES, MAX_FILES, MAX_JSON_BYTES, WEIGHTS
from adapters.format.selection import Selection, normalise_path, reject_path, select
from adapters.format.training_record import MAX_BYTES, SHOWN

AROUND_BYTES = 256 << 20
"""Bytes allowed for files whose size does not depend on the adapter, such as a tokenizer in each checkpoint."""
PACK_LESS = f"pack only the adapter's own files: {', '.join(FILES)}"
MAX_TAR_HEADER_BYTES = 8 << 10
"""Maximum bytes of one tar member's headers. Usually 512, or 1,536 with an extended header."""
MAX_ZIP_READ_BYTES = 512 << 10
"""Maximum bytes of one read from a zip file: its directory, or its end with a comment of up to 64 KiB."""
CHUNK_BYTES = 64 << 10

_ENCRYPTED = 0x1 | 0x40 | 0x2000
_ZIP_END = struct.Struct("<4s16xH")
"""The last record of a zip file: its signature, and the length of the comment that follows."""
_UNREADABLE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error,
    EOFError, ValueError, LookupError, ArithmeticError, NotImplementedError,
)  # fmt: skip
"""Exceptions of tarfile, zipfile and zlib for malformed input."""


@dataclass(frozen=True, slots=True)
class _Member:
    path: str
    is_folder: bool
    size: int
    """Bytes, as the archive says."""
    content: Iterator[bytes]
    """Must be read before the next member is requested, or not at all."""


def max_bytes(limit: int) -> int:
    """Return the maximum bytes of an upload (archive, its unpacked content, or form) if weights take at most ``limit``.

    That fits the largest adapter with one training checkpoint: its weights again and the optimizer's two moments.
    Smaller adapters may come with many checkpoints.
    """
    return 4 * limit + AROUND_BYTES


def unpack(archive: Path, staging: Path, limit: int) -> Selection:
    """Extract an adapter's files from a .tar, .tar.gz or .zip (detected by content) into the folder ``staging``.

    Takes the adapter nearest the top of the archive; ``limit`` is the maximum size of the weights in bytes. Other files
    are skipped. Raises :class:`AdapterRejected` for an archive without an adapter, with several, or
    with anything in it but plain files and folders, and for one that is damaged: ``staging`` may then hold some of the
    files, and nothing outside it has been touched.
    """
    with _translate_damage():
        # Reads the archive twice: only at its end is it known which folder holds the adapter.
        selection = select(_listed(archive, limit))
        _extract(archive, staging, selection.folder, limit)
    return selection


def _listed(archive: Path, limit: int) -> list[str]:
    """Return the paths of the files in the archive."""
    paths = []
    with closing(_members(archive, max_bytes(limit))) as members:
        for number, member in enumerate(members):
            if number == MAX_FILES:
                raise AdapterRejected(f"the archive holds more than {MAX_FILES} files and folders: {PACK_LESS}")
            path = normalise_path(member.path)
            if not member.is_folder:
                if not path:
                    reject_path(member.path, "is a file without a name")
                paths.append(path)
    return paths


def _extract(archive: Path, staging: Path, folder: str, limit: int) -> None:
    wanted = {f"{folder}/{name}" if folder else name: name for name in (*FILES, *SHOWN)}
    with closing(_members(archive, max_bytes(limit))) as members:
        for member in members:
            name = None if member.is_folder else wanted.get(normalise_path(member.path))
            if name in SHOWN:
                _keep_shown(member, staging / name)
            elif name is not None:
                with (staging / name).open("xb") as writer:
                    writer.writelines(_bounded(member, limit if name == WEIGHTS else MAX_JSON_BYTES))


def _keep_shown(member: _Member, target: Path) -> None:
    """Extract a file that is only shown, unless it is too large."""
    with target.open("wb") as writer:
        for chunk in member.content:
            if writer.tell() + len(chunk) > MAX_BYTES[target.name]:
                break
            writer.write(chunk)
        else:
            return
    target.unlink()


def _bounded(member: _Member, limit: int) -> Iterator[bytes]:
    """Yield the member's bytes; refuse more than ``limit``, whatever size the archive declares."""
    if member.size > limit:
        reject_path(member.path, f"is larger than {limit} bytes")
    left = limit
    for chunk in member.content:
        left -= len(chunk)
        if left < 0:
            reject_path(member.path, f"is larger than {limit} bytes")
        yield chunk


def _members(archive: Path, total: int) -> Generator[_Member, None, None]:
    with archive.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"PK":
            yield from _zip_members(archive)
        elif magic[:2] == b"\x1f\x8b":
            yield from _tar_members(_ForwardReader(_gunzipped(file), total))
        else:
            yield from _tar_members(_ForwardReader(_chunks(file), total))


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    """Yield a gzip stream's content in chunks of bounded size, whatever its compression ratio; check its checksum."""
    inflate = zlib.decompressobj(wbits=31)
    for packed in _chunks(file):
        while packed and not inflate.eof:
            yield inflate.decompress(packed, CHUNK_BYTES)
            packed = inflate.unconsumed_tail
        if inflate.eof and (inflate.unused_data or packed).strip(b"\0"):
            raise AdapterRejected("the archive goes on after its end")
    if not inflate.eof:
        raise AdapterRejected("the archive is cut short")


def _tar_members(reader: "_ForwardReader") -> Iterator[_Member]:
    with tarfile.TarFile(fileobj=reader) as tar:
        while (entry := tar.next()) is not None:
            if not entry.isdir() and (entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse()):
                reject_path(entry.name, f"is {_tar_kind(entry)}; only plain files are taken")
            if entry.size < 0:
                reject_path(entry.name, "has a size below zero")
            content = reader.content(0 if entry.isdir() else entry.size)
            yield _Member(entry.name, entry.isdir(), entry.size, content)
            deque(content, maxlen=0)  # skip what was not read
            reader.next_member()
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
    # After the first member tarfile treats any damaged header as the end of the archive.
    if reader.last != bytes(tarfile.BLOCKSIZE):
        raise AdapterRejected("the archive is damaged or cut short")
    if any(chunk.strip(b"\0") for chunk in reader.rest()):
        raise AdapterRejected("the archive goes on after its end")


def _tar_kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return "a link (`tar --dereference` packs what it leads to)"
    return "a sparse file" if entry.issparse() else "a device or FIFO" if entry.isdev() else "of an unusual kind"


class _ForwardReader(io.RawIOBase):
    """A tar file that is read forward only, at most ``total`` bytes. tarfile reads headers with ``read``.

    tarfile trusts a header's statement of the next header's size, so the bytes of headers for one member are bounded.
    """

    def __init__(self, source: Iterator[bytes], total: int) -> None:
        self._source = source
        self._total = total
        self._buffer = bytearray()
        self._position = 0
        self._headers_left = MAX_TAR_HEADER_BYTES
        self.last = b""
        """The bytes that tarfile read last."""

    def read(self, size: int = -1, /) -> bytes:
        self._headers_left -= size
        if size < 0 or self._headers_left < 0:
            raise AdapterRejected(f"the archive has a header larger than {MAX_TAR_HEADER_BYTES} bytes")
        self.last = self._next(size)
        return self.last

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        # Contents are read to their end, so only the rest of a block is ever to be passed over.
        if not 0 <= position - self._position < tarfile.BLOCKSIZE or whence != io.SEEK_SET:
            raise tarfile.ReadError("a header leads elsewhere")
        self._next(position - self._position)
        return self._position

    def next_member(self) -> None:
        """Reset the header budget: tarfile is about to read the headers of the next member."""
        self._headers_left = MAX_TAR_HEADER_BYTES

    def content(self, size: int) -> Iterator[bytes]:
        """Yield the next ``size`` bytes."""
        while size:
            chunk = self._next(min(size, CHUNK_BYTES))
            if not chunk:
                raise AdapterRejected("the archive is cut short")
            size -= len(chunk)
            yield chunk

    def rest(self) -> Iterator[bytes]:
        """Yield the remaining bytes."""
        while chunk := self._next(CHUNK_BYTES):
            yield chunk

    def _next(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer at the end."""
        while len(self._buffer) < size and (chunk := next(self._source, None)) is not None:
            self._buffer += chunk
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._position += len(taken)
        if self._position > self._total:
            raise AdapterRejected(f"the archive holds more than {self._total} bytes: {PACK_LESS}")
        return taken


def _zip_members(path: Path) -> Iterator[_Member]:
    with _BoundedReader(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        _check_extent(file, entries, archive.comment)
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
                reject_path(entry.filename, "is a link or a device; only plain files are taken")
            if entry.flag_bits & _ENCRYPTED:
                reject_path(entry.filename, "is encrypted")
            # entry.filename ends at the first NUL of what the archive says.
            yield _Member(entry.orig_filename, entry.is_dir(), entry.file_size, _zip_content(archive, entry))


def _zip_content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    # The other methods unpack to any size in memory.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        reject_path(entry.filename, "is compressed by another method than deflate")
    left = entry.file_size
    with archive.open(entry) as reader:
        while chunk := reader.read(CHUNK_BYTES):
            left -= len(chunk)
            yield chunk
    if left:
        reject_path(entry.filename, "is cut short")


def _check_extent(file: "_BoundedReader", entries: list[zipfile.ZipInfo], comment: bytes) -> None:
    """Raise AdapterRejected if the archive is not the whole file: zipfile also finds one between other bytes."""
    file.seek(-_ZIP_END.size - len(comment), io.SEEK_END)
    signature, length = _ZIP_END.unpack(file.read(_ZIP_END.size))
    first = min((entry.header_offset for entry in entries), default=0)
    if signature != b"PK\5\6" or length != len(comment) or first:
        raise AdapterRejected("the archive has other bytes before or after it")


class _BoundedReader(io.FileIO):
    """A file that refuses reads of more than :data:`MAX_ZIP_READ_BYTES` and seeks outside it."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = MAX_ZIP_READ_BYTES + 1 if size is None or size < 0 else size
        data = super().read(min(wanted, MAX_ZIP_READ_BYTES + 1)) or b""
        if len(data) > MAX_ZIP_READ_BYTES:
            raise AdapterRejected(f"the archive has a directory larger than {MAX_ZIP_READ_BYTES} bytes: {PACK_LESS}")
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(position, whence)
        except OSError as error:
            raise zipfile.BadZipFile("an offset leads out of the file") from error


@contextmanager
def _translate_damage() -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        reason = f"is no .tar, .tar.gz or .zip archive, or a damaged one: {str(error)[:200]}"
        raise AdapterRejected(reason) from error
