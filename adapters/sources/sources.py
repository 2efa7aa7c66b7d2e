"""Sources: download adapters from addresses that the operator allows, on a model hub, S3 or Google Cloud Storage.

Only the files of an adapter are downloaded, and no code in them is run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import SourceRefused
from adapters.format.files import CHUNK_BYTES, FILES, MAX_JSON_BYTES, REQUIRED, WEIGHTS
from adapters.format.foreign_formats import TYPICAL_FILES, foreign_format_hint
from adapters.format.selection import NO_OTHER_FILES, Selection, select_at_top
from adapters.sources.address import Address, parse_address, parse_prefix
from adapters.sources.hub import download
from adapters.store.remote_store import connect, receive

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_STATE_FIELDS = (("VersionId", "version"), ("generation", "generation"), ("ETag", "etag"))
"""Field of an object's metadata that changes with its content, most reliable first -> its name in a receipt."""


@dataclass(frozen=True, slots=True)
class FetchedAdapter:
    """The result of a download."""

    source: str
    """The exact content that was downloaded: ``hf://owner/name@<commit>``, or ``s3://bucket/prefix#version=...``
    (``#generation=...``, ``#etag=...``) with a value for each file."""
    selection: Selection
    """The other files of a repository; empty for a bucket, which is not listed."""


class Sources:
    """The addresses that adapters may be downloaded from. Any thread may call :meth:`fetch`."""

    def __init__(self, allowed: Sequence[str], limit: int) -> None:
        """``allowed``: addresses and prefixes of them; ``limit``: maximum size of a weights file in bytes.

        Makes no request. Raises :class:`ValueError` for an invalid entry, or one that needs an extra which is not
        installed.
        """
        self._allowed = [parse_prefix(entry) for entry in allowed]
        self._limit = limit
        schemes = {address.scheme for address in self._allowed} - {"hf"}
        self._stores = {scheme: connect(f"{scheme}://bucket")[0] for scheme in sorted(schemes)}

    def allowed(self, address: str) -> Address:
        """Parse an address. Raises :class:`SourceRefused`, also if it is not allowed."""
        parsed = parse_address(address)
        if not any(parsed.within(allowed) for allowed in self._allowed):
            raise SourceRefused(
                f"this server does not allow the source {parsed}; whoever runs it allows it with "
                f"--allow-source {parsed}, or with a prefix of that"
            )
        return parsed

    def fetch(self, address: str, staging: Path) -> FetchedAdapter:
        """Download the adapter at ``address`` into the empty folder ``staging``. Blocks.

        Raises :class:`SourceRefused`, and :class:`AdapterRejected` for a file that is too large.
        """
        parsed = self.allowed(address)
        if parsed.scheme == "hf":
            return self._fetch_repository(parsed, staging)
        bucket = _BucketFolder(self._stores[parsed.scheme], parsed)
        return FetchedAdapter(bucket.fetch(staging, self._limit), NO_OTHER_FILES)

    def _fetch_repository(self, address: Address, staging: Path) -> FetchedAdapter:
        if len(address.parts) != 2:
            raise SourceRefused(f"{address} is not a repository: give hf://OWNER/NAME")
        commit, paths = download("/".join(address.parts), address.revision or "main", staging, self._limit)
        return FetchedAdapter(f"{address}@{commit}", select_at_top(paths))


class _BucketFolder:
    """An adapter's files under one prefix of a bucket."""

    def __init__(self, store: "AbstractFileSystem", address: Address) -> None:
        self._store = store
        self._address = address

    def fetch(self, staging: Path, limit: int) -> str:
        """Download the files; return :attr:`FetchedAdapter.source`."""
        infos = self._file_infos()
        for name, info in infos.items():
            receive(self._read(name, info), staging / name, limit if name == WEIGHTS else MAX_JSON_BYTES)
        source = self._exact_address(infos)
        # _read checks each file separately. If none has changed since the first query, they belong together.
        if self._exact_address(self._file_infos()) != source:
            raise self._changed()
        return source

    def _file_infos(self) -> dict[str, Mapping[str, Any]]:
        """Return file -> metadata. Raises :class:`SourceRefused` if the config or the weights are missing."""
        infos = {}
        for name in FILES:
            try:
                with self._translate_errors():
                    infos[name] = self._store.info(self._path(name), refresh=True)
            except FileNotFoundError:
                if name in REQUIRED:
                    hint = foreign_format_hint(self._typical_files())
                    raise SourceRefused(f"{self._address} has no {name}{hint}") from None
        return infos

    def _typical_files(self) -> list[str]:
        """Return which typical files of any format exist. The prefix is not listed: it may hold millions of files."""
        found = []
        for name in (WEIGHTS, *TYPICAL_FILES):
            with suppress(FileNotFoundError, SourceRefused), self._translate_errors():
                self._store.info(self._path(name), refresh=True)
                found.append(name)
        return found

    def _read(self, name: str, info: Mapping[str, Any]) -> Iterator[bytes]:
        try:
            with self._translate_errors():
                file = self._store.open(self._path(name), "rb")
            with file:
                if _object_state(file.details) != _object_state(info):
                    raise self._changed()
                while True:
                    with self._translate_errors():
                        data = file.read(CHUNK_BYTES)
                    if not data:
                        return
                    yield data
        except FileNotFoundError:
            raise self._changed() from None

    def _exact_address(self, infos: Mapping[str, Mapping[str, Any]]) -> str:
        states = [_object_state(info) for info in infos.values()]
        kinds = {state[0] for state in states if state}
        if len(kinds) != 1 or None in states:
            raise SourceRefused(
                f"{self._address} is in a store that reports no version, generation or ETag of its files, so a change "
                "during the download would go unnoticed; download the files yourself and upload them"
            )
        return f"{self._address}#{kinds.pop()}={','.join(state[1] for state in states if state)}"

    def _path(self, name: str) -> str:
        return "/".join((*self._address.parts, name))

    def _changed(self) -> SourceRefused:
        return SourceRefused(f"{self._address} changed while it was read; try again")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            # Each client raises its own exceptions, and their messages may contain signed URLs.
            raise SourceRefused(
                f"{self._address} cannot be read ({type(error).__name__}); check the server's credentials"
            ) from error


def _object_state(info: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the kind and value of what changes whenever the object does; None if the store reports nothing."""
    for field, kind in _STATE_FIELDS:
        value = str(info.get(field) or "").strip('"')
        # "null" is the version of every object in a bucket without versions.
        if value not in ("", "null"):
            return kind, value
    return None
