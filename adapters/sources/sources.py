"""Adapters from addresses the operator allows, on a model hub, S3 or Google Cloud Storage.

Only the files an adapter is made of are ever downloaded, and nothing of them is run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import SourceRefused
from adapters.format.files import CHUNK_BYTES, FILES, MAX_JSON_BYTES, ORIGIN, WEIGHTS
from adapters.format.foreign_formats import TELLING, instead
from adapters.format.selection import ALONE, Selection, beside
from adapters.sources.hub import download
from adapters.store.remote_store import connect, receive

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._=+,-]*[A-Za-z0-9_=+])?"
_HUB = re.compile(rf"hf://({_PART}(?:/{_PART})?)/?(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_BUCKET = re.compile(rf"(s3|gs)://({_PART}(?:/{_PART})*)/?")
_GRAMMAR = (
    "is not hf://OWNER/NAME, hf://OWNER/NAME@REVISION, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX "
    "(ASCII letters, digits and . _ - = + , only; no empty parts)"
)
_MARKS = (("VersionId", "version"), ("generation", "generation"), ("ETag", "etag"))
"""What a store's file listing says of the state of a file, the surest first -> what it is called in a pinned source."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an adapter is, or a prefix that adapters may be under."""

    scheme: str
    parts: tuple[str, ...]
    """Owner and name, or the bucket and the parts of the key."""
    revision: str | None = None
    """Of a hub's repository: a branch, a tag or a commit."""

    def __str__(self) -> str:
        return f"{self.scheme}://{'/'.join(self.parts)}"

    def within(self, allowed: "Address") -> bool:
        """Whether it is ``allowed`` itself, or below it."""
        return self.scheme == allowed.scheme and self.parts[: len(allowed.parts)] == allowed.parts


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter that has been downloaded."""

    source: str
    """What it was, as an address that never means anything else: ``hf://owner/name@<commit>``,
    ``s3://bucket/prefix#version=...``, or ``#generation=...``, or ``#etag=...`` with a value for each file."""
    selection: Selection
    """What a repository holds besides; nothing is known of what else is in a bucket."""


class Sources:
    """The addresses that adapters may be fetched from. Threads may share it."""

    def __init__(self, allowed: Sequence[str], limit: int) -> None:
        """``allowed``: addresses and prefixes of them; ``limit``: largest weights file in bytes.

        Asks the network nothing. Raises :class:`ValueError` for an entry that is no prefix of an address, or one that
        takes an extra which is not installed.
        """
        self._allowed = [_allowed(entry) for entry in allowed]
        self._limit = limit
        schemes = {address.scheme for address in self._allowed} - {"hf"}
        self._stores = {scheme: connect(f"{scheme}://bucket")[0] for scheme in sorted(schemes)}

    def fetch(self, address: str, staging: Path) -> Fetched:
        """Download the adapter at ``address`` into the empty folder ``staging``. Blocks.

        Raises :class:`SourceRefused`, and :class:`AdapterRejected` for a file that is too large.
        """
        wanted = parse_address(address)
        if not any(wanted.within(allowed) for allowed in self._allowed):
            raise SourceRefused(
                f"{wanted} is not within an address that this server allows; whoever runs it allows it with "
                f"--allow-source {wanted}, or with a prefix of that"
            )
        if wanted.scheme == "hf":
            return self._fetch_repository(wanted, staging)
        return Fetched(_Objects(self._stores[wanted.scheme], wanted).fetch(staging, self._limit), ALONE)

    def _fetch_repository(self, wanted: Address, staging: Path) -> Fetched:
        if len(wanted.parts) != 2:
            raise SourceRefused(f"{wanted} names no repository: hf://OWNER/NAME")
        commit, paths = download("/".join(wanted.parts), wanted.revision or "main", staging, self._limit)
        return Fetched(f"{wanted}@{commit}", beside(paths))


def parse_address(text: str) -> Address:
    """Raises :class:`SourceRefused`, which does not repeat what may hold somebody's password."""
    if found := _HUB.fullmatch(text):
        revision = found[2]
        if revision is None or not {"", ".", ".."} & set(revision.split("/")):
            return Address("hf", tuple(found[1].split("/")), revision)
    elif found := _BUCKET.fullmatch(text):
        return Address(found[1], tuple(found[2].split("/")))
    raise SourceRefused(f"the source {_GRAMMAR}")


def _allowed(entry: str) -> Address:
    try:
        address = parse_address(entry)
    except SourceRefused:
        raise ValueError(f"{entry!r} {_GRAMMAR}, nor a prefix of one") from None
    if address.revision is not None:
        raise ValueError(f"{entry!r} has a revision: all or none of a repository can be allowed")
    return address


class _Objects:
    """An adapter's files as objects under one prefix of a bucket."""

    def __init__(self, store: "AbstractFileSystem", address: Address) -> None:
        self._store = store
        self._address = address

    def fetch(self, staging: Path, limit: int) -> str:
        infos = self._infos()
        for name, info in infos.items():
            receive(self._read(name, info), staging / name, limit if name == WEIGHTS else MAX_JSON_BYTES)
        source = self._pinned(infos)
        # Each file was read in one state; that they were in these states at one time is seen by looking again.
        if self._pinned(self._infos()) != source:
            raise self._changed()
        return source

    def _infos(self) -> dict[str, Mapping[str, Any]]:
        infos = {}
        for name in FILES:
            try:
                with self._reached():
                    infos[name] = self._store.info(self._path(name), refresh=True)
            except FileNotFoundError:
                if name != ORIGIN:
                    raise SourceRefused(f"{self._address} has no {name}{instead(self._telling())}") from None
        return infos

    def _telling(self) -> list[str]:
        """Names of files by which another format is known. A prefix may hold millions: it is not listed."""
        there = []
        for name in (WEIGHTS, *TELLING):
            with suppress(FileNotFoundError, SourceRefused), self._reached():
                self._store.info(self._path(name), refresh=True)
                there.append(name)
        return there

    def _read(self, name: str, info: Mapping[str, Any]) -> Iterator[bytes]:
        try:
            with self._reached():
                file = self._store.open(self._path(name), "rb")
            with file:
                if _mark(file.details) != _mark(info):
                    raise self._changed()
                while True:
                    with self._reached():
                        data = file.read(CHUNK_BYTES)
                    if not data:
                        return
                    yield data
        except FileNotFoundError:
            raise self._changed() from None

    def _pinned(self, infos: Mapping[str, Mapping[str, Any]]) -> str:
        marks = [_mark(info) for info in infos.values()]
        kinds = {mark[0] for mark in marks if mark}
        if len(kinds) != 1 or None in marks:
            raise SourceRefused(f"{self._address} is in a store that does not tell one state of a file from another")
        return f"{self._address}#{kinds.pop()}={','.join(mark[1] for mark in marks if mark)}"

    def _path(self, name: str) -> str:
        return "/".join((*self._address.parts, name))

    def _changed(self) -> SourceRefused:
        return SourceRefused(f"{self._address} changed while it was read")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            # Clients have exceptions of their own, whose texts hold signed addresses.
            raise SourceRefused(f"{self._address} cannot be read: {type(error).__name__}") from error


def _mark(info: Mapping[str, Any]) -> tuple[str, str] | None:
    """Kind and value of what changes whenever the file does."""
    for field, kind in _MARKS:
        value = str(info.get(field) or "").strip('"')
        # "null" is the version of every object in a bucket without versions.
        if value not in ("", "null"):
            return kind, value
    return None
