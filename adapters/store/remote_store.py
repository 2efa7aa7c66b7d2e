"""RemoteStore: adapters' content in a folder, a bucket or anything fsspec supports, shared by several servers."""

import errno
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from adapters.errors import AdapterError, AdapterRejected, RegistryUnavailable, StoreFull
from adapters.format.files import CHUNK_BYTES, CONFIG, MAX_JSON_BYTES, OPTIONAL, ORIGIN, WEIGHTS, present, sync
from adapters.format.spec import AdapterId
from adapters.format.training_record import MAX_BYTES, SHOWN

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PART_BYTES = 8 << 20
_ID = re.compile(r"[0-9a-f]{64}")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s?#%]+")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_S3: Mapping[str, Any] = {
    "default_block_size": _PART_BYTES,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 20,
        "retries": {"total_max_attempts": 2, "mode": "standard"},
    },
}
_CLIENT = {
    "s3": _S3,
    "s3a": _S3,
    "gs": {"block_size": _PART_BYTES, "requests_timeout": 60},
    "gcs": {"block_size": _PART_BYTES, "requests_timeout": 60},
    "file": {"auto_mkdir": True},
}
"""Options by protocol: timeouts, and bounds on how much of a file is in memory."""
_UPLOAD = {
    "s3": {"chunksize": _PART_BYTES, "max_concurrency": 2},
    "s3a": {"chunksize": _PART_BYTES, "max_concurrency": 2},
    "gs": {"chunksize": _PART_BYTES},
    "gcs": {"chunksize": _PART_BYTES},
}


class RemoteStore:
    """Contents under one address, each a folder named by its digest. Thread-safe.

    The config is uploaded last and deleted first: content without it does not exist. The remote is not trusted to keep
    the bytes intact, so readers must compare the digest.
    """

    def __init__(self, url: str) -> None:
        """``url``: any fsspec address, e.g. ``s3://bucket/adapters``; credentials come from the environment.

        Makes no request. Raises :class:`ValueError` for an invalid address, or one that needs an extra which is not
        installed.
        """
        self.url = url
        self._files, root = connect(url)
        self._root = root.rstrip("/")
        self._protocol = urlsplit(url).scheme

    def put(self, adapter_id: AdapterId, folder: Path, record: str | None = None) -> None:
        """Upload the adapter's files from ``folder``, replacing what is there: it may be damaged.

        ``record``: the folder of a record within ``folder``, which is uploaded, too.

        Raises :class:`RegistryUnavailable`, :class:`StoreFull`.
        """
        for name in SHOWN:
            if record is not None and (folder / record / name).exists():
                self._upload(folder / record / name, self._path(adapter_id, record, name))
        names = present(folder)
        for name in (*OPTIONAL, WEIGHTS, CONFIG):
            if name in names:
                self._upload(folder / name, self._path(adapter_id, name))
        if self._protocol == "file":
            with self._translate_errors():
                content = Path(self._path(adapter_id))
                for each in (content, content.parent, content.parent.parent):
                    sync(each)

    def get(self, adapter_id: AdapterId, staging: Path, limit: int) -> None:
        """Download the adapter's files into the empty folder ``staging``; weights of at most ``limit`` bytes.

        The caller must compare their digest. Raises :class:`AdapterError` if the content is not there, and
        :class:`RegistryUnavailable`.
        """
        for name in (CONFIG, *OPTIONAL, WEIGHTS):
            data = self._open(adapter_id, name)
            if data is not None:
                receive(data, staging / name, limit if name == WEIGHTS else MAX_JSON_BYTES)
            elif name not in OPTIONAL:
                self._check_bucket()
                raise self._missing(adapter_id)

    def get_shown(self, adapter_id: AdapterId, record: str, staging: Path) -> None:
        """Download the manifest and a record into the empty folder ``staging``. Raises as :meth:`get` does."""
        if self._open(adapter_id, CONFIG) is None:
            self._check_bucket()
            raise self._missing(adapter_id)
        if (manifest := self._open(adapter_id, ORIGIN)) is not None:
            receive(manifest, staging / ORIGIN, MAX_JSON_BYTES)
        for name in SHOWN:
            if (data := self._open(adapter_id, name, record)) is not None:
                receive(data, staging / name, MAX_BYTES[name])

    def has_record(self, adapter_id: AdapterId, record: str) -> bool:
        """Return whether a record is there. Raises :class:`RegistryUnavailable`."""
        with self._translate_errors():
            return any(self._files.exists(self._path(adapter_id, record, name)) for name in SHOWN)

    def delete(self, adapter_id: AdapterId) -> None:
        """Delete a content, or what is left of it. Raises :class:`RegistryUnavailable`."""
        for path in (self._path(adapter_id, CONFIG), self._path(adapter_id)):
            try:
                with self._translate_errors():
                    self._files.rm(path, recursive=True)
            except FileNotFoundError:
                self._check_bucket()

    def _path(self, adapter_id: AdapterId, *name: str) -> str:
        if not _ID.fullmatch(adapter_id):
            raise AdapterError(f"{adapter_id!r} is not an adapter id")
        return "/".join((self._root, adapter_id, *name))

    def _upload(self, source: Path, path: str) -> None:
        try:
            with self._translate_errors():
                if self._protocol == "file":
                    self._copy(source, Path(path))
                else:
                    self._files.put_file(str(source), path, **_UPLOAD.get(self._protocol, {}))
        except FileNotFoundError as error:
            raise self._unavailable(error) from error

    def _copy(self, source: Path, path: Path) -> None:
        # Objects in a bucket appear atomically; a file in a folder needs a rename for that.
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            self._files.put_file(str(source), str(part))
            sync(part)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)

    def _open(self, adapter_id: AdapterId, name: str, *folder: str) -> Iterator[bytes] | None:
        """Return the bytes of a file in chunks; None if there is no such file."""
        path = self._path(adapter_id, *folder, name)
        try:
            with self._translate_errors():
                if name == WEIGHTS:
                    return self._chunks(adapter_id, self._files.open(path, "rb"))
                # One request: `open` asks for the size first, and lists the bucket where there is no such file.
                return iter((self._files.cat_file(path, start=0, end=MAX_BYTES.get(name, MAX_JSON_BYTES) + 1),))
        except FileNotFoundError:
            return None

    def _chunks(self, adapter_id: AdapterId, file: BinaryIO) -> Iterator[bytes]:
        with file:
            while True:
                try:
                    with self._translate_errors():
                        data = file.read(CHUNK_BYTES)
                except FileNotFoundError as error:
                    raise self._missing(adapter_id) from error
                if not data:
                    return
                yield data

    def _missing(self, adapter_id: AdapterId) -> AdapterError:
        return AdapterError(f"adapter {adapter_id} is not in the store {self.url}")

    def _check_bucket(self) -> None:
        """Raise :class:`RegistryUnavailable` if it is the bucket that does not exist, not only a file in it."""
        if self._protocol not in _EXTRAS:
            return
        try:
            with self._translate_errors():
                self._files.info(self._root.partition("/")[0])
        except FileNotFoundError as error:
            raise self._unavailable(error) from error

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, RegistryUnavailable):
            raise
        except Exception as error:
            # Each store's client has exceptions of its own; all of them mean that it did not answer as it should.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(f"no room in the store {self.url}: {error.strerror}") from error
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> RegistryUnavailable:
        # Name only the exception's type: messages of clients may contain signed addresses.
        return RegistryUnavailable(f"the store {self.url} does not answer as it should: {type(error).__name__}")


def connect(url: str) -> "tuple[AbstractFileSystem, str]":
    """Return the file system of an address, and the path on it. Raises :class:`ValueError`.

    Listings are not cached: other servers change them.
    """
    import fsspec

    if not _URL.fullmatch(url) or "::" in url or "@" in urlsplit(url).netloc or ".." in url.split("/"):
        raise ValueError("must be an address like s3://bucket/adapters, without credentials, query, `..` or blanks")
    protocol = urlsplit(url).scheme
    options = _CLIENT.get(protocol, {})
    try:
        files, path = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        install = f'run: pip install "manylora[{extra}]"' if extra else str(error)
        raise ValueError(f"{protocol}:// needs a package that is not installed; {install}") from error
    if hasattr(files, "retries"):
        # s3fs would repeat botocore's own retries.
        files.retries = 2
    return files, path


def receive(data: Iterable[bytes], target: Path, limit: int) -> None:
    """Write chunks to the new file ``target``. Raises :class:`AdapterRejected` beyond ``limit`` bytes."""
    size = 0
    with target.open("xb") as file:
        for chunk in data:
            size += len(chunk)
            if size > limit:
                raise AdapterRejected(f"is larger than {limit} bytes", file=target.name)
            file.write(chunk)
