"""The files an adapter is made of, and how they are opened and read."""

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import AdapterRejected
from adapters.format.foreign_formats import recognise

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ORIGIN = "manylora.json"
"""Optional; records which base the adapter was trained on."""

HASHED = {CONFIG: "adapter_config_sha256", WEIGHTS: "weights_sha256"}
"""File -> the optional field of :data:`ORIGIN` with its SHA-256 when the adapter was evaluated."""

TEMPLATE = "chat_template.jinja"
"""Optional; the chat template that the adapter was trained with."""
TOKENIZER_CONFIG = "tokenizer_config.json"
"""Optional; older trainers keep the chat template in it."""

REQUIRED = (CONFIG, WEIGHTS)
FILES = (*REQUIRED, ORIGIN, TEMPLATE, TOKENIZER_CONFIG)
"""The files of an adapter, in the order in which they are hashed."""
OPTIONAL = FILES[len(REQUIRED) :]

MAX_FILES = 4096
"""Maximum number of files and folders in a folder, an archive or a form."""
MAX_JSON_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20

SCHEME = b"manylora adapter 1\n"
"""The first line of what :func:`adapters.format.content.content_id` hashes."""


def present(folder: Path) -> tuple[str, ...]:
    """Return the names of the adapter's files in ``folder``, in the order of :data:`FILES`.

    Raises :class:`AdapterRejected` if the config or the weights are missing, and names a foreign format found instead.
    """
    names = _present(folder)
    for name in REQUIRED:
        if name not in names:
            raise recognise(listing(folder)) or AdapterRejected("is missing", file=name)
    return names


def listing(folder: Path) -> list[str]:
    """Return the relative paths of all files below ``folder``; those of an adapter at its top come first.

    At most :data:`MAX_FILES`; links to folders are not followed.
    """
    found = dict.fromkeys(_present(folder))
    for place, folders, names in os.walk(folder):
        folders.sort()
        within = os.path.relpath(place, folder)
        found |= dict.fromkeys(sorted(os.path.normpath(f"{within}/{name}") for name in names))
        if len(found) >= MAX_FILES:
            break
    return list(found)[:MAX_FILES]


def _present(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise AdapterRejected("is not a folder that can be read", file=folder.name)
    return tuple(name for name in FILES if os.path.lexists(folder / name))


def open_file(folder: Path, name: str) -> BinaryIO:
    """Open one of the adapter's files for reading. Symbolic links are followed, but only to regular files."""
    try:
        # Opening a FIFO would block until somebody writes to it; O_NONBLOCK changes nothing for regular files.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise AdapterRejected(reason, file=name) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterRejected("is not a regular file", file=name)
    return os.fdopen(descriptor, "rb")


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to stable storage (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def chunks(file: BinaryIO, name: str, limit: int | None = None) -> Iterator[bytes]:
    """Yield the file's bytes from its position to its end.

    Raises :class:`AdapterRejected` for more than ``limit`` bytes, or if reading fails.
    """
    left = limit
    if limit is not None and size_of(file) > limit:
        raise AdapterRejected(f"is larger than {limit} bytes", file=name)
    while True:
        try:
            chunk = file.read(CHUNK_BYTES)
        except OSError as error:
            raise AdapterRejected(f"cannot be read: {error.strerror}", file=name) from error
        if not chunk:
            return
        if left is not None:
            left -= len(chunk)
            # The file has more bytes than its size: it grows, or lies in /proc.
            if left < 0:
                raise AdapterRejected(f"is larger than {limit} bytes", file=name)
        yield chunk


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises :class:`AdapterRejected`."""
    with open_file(folder, name) as file:
        return parse_object(b"".join(chunks(file, name, MAX_JSON_BYTES)), name)


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object in UTF-8. Duplicate keys are refused, because parsers differ in which value they use."""
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"is not valid JSON: {error}", file=name) from error
    if not isinstance(parsed, dict):
        raise AdapterRejected("is not a JSON object", file=name)
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        unique[key] = value
    return unique
