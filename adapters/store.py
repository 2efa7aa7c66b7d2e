"""Where adapters live on disk: one directory per content, named by its sha256, never changed once it is there."""

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import AdapterError, AdapterRejected, StoreFull
from adapters.files import MAX_JSON_BYTES, WEIGHTS, chunks, content_id, open_file, present
from adapters.header import MAX_HEADER_BYTES
from adapters.spec import AdapterId, AdapterSpec, BaseLayout
from adapters.verify import read_spec, verify
from adapters.weights import AdapterWeights, read_weights

_ID = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AdapterStore:
    """Content-addressed directories under ``root``, which one process owns. Any thread may call any method."""

    def __init__(self, root: Path, layout: BaseLayout, max_rank: int) -> None:
        self.root = root
        self._layout = layout
        self._max_rank = max_rank
        # The largest weights file an adapter of this base can have: float32 throughout.
        values = max_rank * sum(inputs + outputs for inputs, outputs in layout.linears.values())
        self._limit = 8 + MAX_HEADER_BYTES + 4 * values
        # What reading an entry's config has told before: it costs more than reading small weights.
        self._specs: dict[AdapterId, AdapterSpec] = {}
        root.mkdir(parents=True, exist_ok=True)

    def add(self, folder: Path) -> AdapterSpec:
        """Copy a PEFT folder into the store, verify the copy, and only then give it its name.

        Content that is here already stays as it is. The entry is on stable storage when this returns.
        Raises :class:`AdapterRejected`, or :class:`StoreFull`; either way nothing is left behind.
        """
        names = present(folder)
        with _full_disk_named(), self._temporary() as copy:
            for name in names:
                _copy(folder, copy, name, self._limit if name == WEIGHTS else MAX_JSON_BYTES)
            _sync_directory(copy)
            spec = verify(copy, self._layout, self._max_rank)
            self._publish(copy, spec.id)
        self._specs[spec.id] = spec
        return spec

    def __contains__(self, adapter_id: AdapterId) -> bool:
        return self.path(adapter_id).is_dir()

    def path(self, adapter_id: AdapterId) -> Path:
        """The entry's directory, whether it exists or not."""
        if not _ID.fullmatch(adapter_id):
            raise AdapterError(f"{adapter_id!r} is not an adapter id")
        return self.root / adapter_id

    def read(self, adapter_id: AdapterId) -> AdapterWeights:
        """Read an adapter into memory. Raises :class:`AdapterError` where the bytes are gone or no longer the same."""
        path = self.path(adapter_id)
        if not self._intact(adapter_id):
            raise AdapterError(f"adapter {adapter_id} is {'damaged on disk' if adapter_id in self else 'not stored'}")
        spec = self._specs.get(adapter_id)
        if spec is None:
            spec = self._specs[adapter_id] = read_spec(path, self._layout, self._max_rank, adapter_id)
        return read_weights(path, spec)

    def remove(self, adapter_id: AdapterId) -> None:
        """Remove an entry: at once for everybody else, then its bytes."""
        shutil.rmtree(self.detach(adapter_id))

    def detach(self, adapter_id: AdapterId) -> Path:
        """Take an entry out of the store in one atomic step; its bytes stay in the returned directory."""
        self._specs.pop(adapter_id, None)
        trash = self.root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            return self.path(adapter_id).rename(trash)
        except FileNotFoundError as error:
            raise AdapterError(f"adapter {adapter_id} is not stored") from error

    def sweep(self, keep: Set[AdapterId]) -> None:
        """Remove entries not in ``keep`` and what a crash left half done. Not while anybody adds."""
        for path in self.root.iterdir():
            if path.name.startswith(_TEMPORARY) or (_ID.fullmatch(path.name) and path.name not in keep):
                shutil.rmtree(path)

    def _publish(self, copy: Path, adapter_id: AdapterId) -> None:
        while True:
            try:
                copy.rename(self.path(adapter_id))
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            if self._intact(adapter_id):
                break
            # An entry that has rotted makes way for the good copy; one that is just being removed is gone already.
            with suppress(AdapterError):
                self.remove(adapter_id)
        _sync_directory(self.root)

    def _intact(self, adapter_id: AdapterId) -> bool:
        try:
            return content_id(self.path(adapter_id)) == adapter_id
        except AdapterRejected:
            return False

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
        try:
            yield path
        finally:
            if path.exists():
                shutil.rmtree(path)


def _copy(source: Path, target: Path, name: str, limit: int) -> None:
    with open_file(source, name) as reader, (target / name).open("xb") as writer:
        for chunk in chunks(reader, name, limit):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(f"no room to store the adapter: {error.strerror}") from error
        raise
