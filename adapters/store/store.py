"""AdapterStore: adapters on disk, one folder per content, named by its sha256, never changed once it is there."""

import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from adapters.errors import AdapterError, AdapterRejected, StoreFull
from adapters.format.chat_template import read_chat_template
from adapters.format.content import content_id
from adapters.format.files import FILES, MAX_JSON_BYTES, WEIGHTS, chunks, open_file, present, sync
from adapters.format.safetensors_header import MAX_HEADER_BYTES
from adapters.format.selection import Selection, select_in_folder
from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout
from adapters.format.training_record import RECORDS, SHOWN, copy_shown, present_shown, record_folder
from adapters.format.verify import read_spec, verify
from adapters.format.weights import AdapterWeights, read_weights
from adapters.store.remote_store import RemoteStore

T = TypeVar("T")

_ID = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".tmp-"
MAX_SPECS = 512
"""Maximum number of cached specs."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AdapterStore:
    """Content-addressed directories under ``root``, which one process owns. Any thread may call any method.

    With a ``remote``, the remote is the durable store, shared with other servers, and ``root`` is a cache of it: the
    least recently read copies are evicted when all together take more than ``cache`` bytes.
    """

    def __init__(
        self,
        root: Path,
        layout: BaseLayout,
        max_rank: int,
        *,
        remote: RemoteStore | None = None,
        cache: int | None = None,
    ) -> None:
        self.root = root
        self.remote = remote
        self._cache = cache if remote is not None else None  # without a remote these are no copies
        self._layout = layout
        self._max_rank = max_rank
        # The largest weights file an adapter of this base can have: float32 throughout.
        values = max_rank * sum(inputs + outputs for inputs, outputs in layout.linears.values())
        self.limit = 8 + MAX_HEADER_BYTES + 4 * values
        """Maximum size of a weights file in bytes."""
        self._specs: OrderedDict[AdapterId, AdapterSpec] = OrderedDict()
        self._lock = threading.Condition(threading.Lock())
        """Guards state in memory; never held during I/O."""
        self._readers: Counter[AdapterId] = Counter()
        self._leaving: AdapterId | None = None
        """The copy that is being evicted."""
        self._trims = 0
        """Number of additions since the evicting thread last looked; 0 if no thread is evicting."""
        self._sizes: dict[AdapterId, int] = {}
        """Size of each copy in bytes, cached."""
        root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Yield an empty folder for an adapter's files; it is deleted at the end unless it was published."""
        with translate_disk_full():
            path = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
            try:
                yield path
            finally:
                if path.exists():
                    shutil.rmtree(path)

    def copy(self, folder: Path, staging: Path) -> Selection:
        """Copy an adapter's files from a PEFT folder; return which other files were ignored.

        Raises :class:`AdapterRejected`, or :class:`StoreFull`.
        """
        selection = select_in_folder(folder)
        for name in present(folder):
            _copy(folder, staging, name, self.limit if name == WEIGHTS else MAX_JSON_BYTES)
        copy_shown(folder, staging)
        return selection

    def seal(self, staging: Path, *, any_base: bool = False, any_fields: bool = False) -> AdapterSpec:
        """Flush the staged files to stable storage and verify them. Raises :class:`AdapterRejected`."""
        for name in present(staging):
            sync(staging / name)
        sync(staging)
        spec = verify(staging, self._layout, self._max_rank, any_base=any_base, any_fields=any_fields)
        self._remember(spec)
        return spec

    def publish(self, staging: Path, adapter_id: AdapterId, name: str = "", record_bytes: int = 0) -> None:
        """Move sealed content to its entry. An intact entry that exists already is kept.

        The record beside the content is kept for this name if it has ``record_bytes``: what :meth:`new_record_bytes`
        has returned. When this returns, the entry is on stable storage, and in the remote if there is one.
        """
        with self._reading(adapter_id):
            record = self._separate_record(staging, name) if record_bytes else None
            for each in SHOWN:
                (staging / each).unlink(missing_ok=True)
            if not self._place(staging, adapter_id) and record is not None:
                self._add_record(staging, adapter_id, record)
            if self.remote is not None:
                self.remote.put(adapter_id, self.path(adapter_id), record)
            self._sizes.pop(adapter_id, None)
            self._trim()

    def new_record_bytes(self, staging: Path, adapter_id: AdapterId, name: str) -> int:
        """Return the size of the staged record, 0 if the name has one already or none is staged."""
        staged = present_shown(staging)
        if not staged or self._has_record(adapter_id, record_folder(name)):
            return 0
        return sum((staging / each).stat().st_size for each in staged)

    @contextmanager
    def shown(self, adapter_id: AdapterId, name: str) -> Iterator[tuple[Path, Path]]:
        """Yield the folder with the entry's manifest, and that with the record which has come under ``name``.

        Fetches them from the remote if they are not here, without the weights. Raises AdapterError if the entry is
        nowhere, RegistryUnavailable and StoreFull.
        """
        record = record_folder(name)
        with self._reading(adapter_id):
            path = self.path(adapter_id)
            if adapter_id in self and (self.remote is None or (path / record).is_dir()):
                yield path, path / record
                return
            if self.remote is None:
                raise AdapterError(f"adapter {adapter_id} is not stored")
            with self.stage() as staging:
                self.remote.get_shown(adapter_id, record, staging)
                yield staging, staging

    def __contains__(self, adapter_id: AdapterId) -> bool:
        return self.path(adapter_id).is_dir()

    def ids(self) -> set[AdapterId]:
        """Return the ids of all entries under ``root``."""
        return {AdapterId(path.name) for path in self.root.iterdir() if _ID.fullmatch(path.name)}

    def path(self, adapter_id: AdapterId) -> Path:
        """Return the entry's folder, whether it exists or not."""
        if not _ID.fullmatch(adapter_id):
            raise AdapterError(f"{adapter_id!r} is not an adapter id")
        return self.root / adapter_id

    def read(self, adapter_id: AdapterId) -> AdapterWeights:
        """Read an adapter into memory; its weights are read once, and their digest is compared on the way.

        Raises :class:`AdapterError` if the bytes are gone or damaged and no remote has good ones.
        """
        return self._read_intact(adapter_id, lambda path: read_weights(path, self._spec(path, adapter_id)))

    def inspect(self, adapter_id: AdapterId, *, any_base: bool = False) -> AdapterSpec:
        """Verify an entry once more, for the base at hand. Raises :class:`AdapterError`, as :meth:`read` does."""

        def check(path: Path) -> AdapterSpec:
            # Whoever had it stored has allowed its unknown fields, and they do not depend on the base.
            spec = verify(path, self._layout, self._max_rank, any_base=any_base, any_fields=True)
            if spec.id != adapter_id:
                raise AdapterError(f"the files of adapter {adapter_id} were changed: their content is now {spec.id}")
            return spec

        return self._read_intact(adapter_id, check)

    def chat_template(self, adapter_id: AdapterId) -> object:
        """Return the chat template in an adapter's files (see :func:`read_chat_template`), None if there is none.

        Raises :class:`AdapterError` if the files are gone and no remote has them.
        """
        return self._read_intact(adapter_id, read_chat_template)

    def detach(self, adapter_id: AdapterId) -> Path | None:
        """Remove an entry from ``root`` atomically; return the folder that now holds its bytes, if any."""
        self._specs.pop(adapter_id, None)
        self._sizes.pop(adapter_id, None)
        trash = self.root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            return self.path(adapter_id).rename(trash)
        except FileNotFoundError:
            return None

    def erase(self, adapter_id: AdapterId) -> None:
        """Delete an entry everywhere, if it is there."""
        trash = self.detach(adapter_id)
        if trash is not None:
            shutil.rmtree(trash)
        if self.remote is not None:
            self.remote.delete(adapter_id)

    def sweep(self, keep: Set[AdapterId]) -> None:
        """Delete entries that are not in ``keep``, and unfinished ones that a crash left. Must be called first."""
        for path in self.root.iterdir():
            if path.name.startswith(_TEMPORARY) or (_ID.fullmatch(path.name) and path.name not in keep):
                shutil.rmtree(path)

    def _has_record(self, adapter_id: AdapterId, record: str) -> bool:
        if (self.path(adapter_id) / record).is_dir():
            return True
        return self.remote is not None and self.remote.has_record(adapter_id, record)

    def _separate_record(self, staging: Path, name: str) -> str:
        """Move the staged record into a folder of its own and return which."""
        record = record_folder(name)
        (staging / record).mkdir(parents=True)
        for each in present_shown(staging):
            (staging / each).rename(staging / record / each)
        return record

    def _add_record(self, staging: Path, adapter_id: AdapterId, record: str) -> None:
        target = self.path(adapter_id) / record
        target.parent.mkdir(exist_ok=True)
        try:
            (staging / record).rename(target)
        except OSError as error:
            # Somebody else has just registered the same under this name.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise

    def _place(self, staging: Path, adapter_id: AdapterId) -> bool:
        """Move the staged files to the entry; return False if it is there already, and intact."""
        moved = False
        while True:
            try:
                staging.rename(self.path(adapter_id))
                moved = True
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            if self._intact(adapter_id):
                break
            # A damaged entry is replaced by the good copy; one that is being removed may be gone already.
            trash = self.detach(adapter_id)
            if trash is not None:
                shutil.rmtree(trash)
        sync(self.root)
        return moved

    def _intact(self, adapter_id: AdapterId) -> bool:
        try:
            return content_id(self.path(adapter_id)) == adapter_id
        except AdapterRejected:
            return False

    def _read_intact(self, adapter_id: AdapterId, read: Callable[[Path], T]) -> T:
        """Return what ``read`` makes of an entry's folder, which stays while it reads.

        ``read`` compares the digest and raises AdapterError for an entry that is damaged; that is then fetched from the
        remote, and read again.
        """
        with self._reading(adapter_id):
            try:
                result = read(self.path(adapter_id))
            except AdapterError:
                if self._intact(adapter_id):
                    raise
                self._restore(adapter_id)
                result = read(self.path(adapter_id))
            if self._cache is not None:
                self._note_read(adapter_id)
            return result

    def _spec(self, path: Path, adapter_id: AdapterId) -> AdapterSpec:
        spec = self._specs.get(adapter_id)
        if spec is None:
            spec = read_spec(path, self._layout, self._max_rank, adapter_id)
            self._remember(spec)
        return spec

    @contextmanager
    def _reading(self, adapter_id: AdapterId) -> Iterator[None]:
        """Keep a copy from being evicted."""
        with self._lock:
            self._lock.wait_for(lambda: self._leaving != adapter_id)
            self._readers[adapter_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[adapter_id] -= 1
                self._readers += Counter()

    def _restore(self, adapter_id: AdapterId) -> None:
        if self.remote is None:
            raise AdapterError(f"adapter {adapter_id} is {'damaged on disk' if adapter_id in self else 'not stored'}")
        with self.stage() as staging:
            self.remote.get(adapter_id, staging, self.limit)
            if content_id(staging) != adapter_id:
                raise AdapterError(f"adapter {adapter_id} is damaged in the remote store")
            for name in present(staging):
                sync(staging / name)
            self._place(staging, adapter_id)
        self._trim()

    def _trim(self) -> None:
        """Evict the least recently read copies until the others fit ``cache``; copies that are being read stay.

        One thread at a time: another that has added a copy leaves the work to the one that is evicting already. No lock
        is held during I/O, so a slow disk does not block loads.
        """
        if self._cache is None:
            return
        with self._lock:
            self._trims += 1
            if self._trims > 1:
                return
        while True:
            try:
                self._drop_excess(self._cache)
            except BaseException:
                with self._lock:
                    self._trims = 0
                raise
            with self._lock:
                if self._trims == 1:
                    self._trims = 0
                    return
                self._trims = 1

    def _drop_excess(self, cache: int) -> None:
        sizes = {adapter_id: self._size(adapter_id) for adapter_id in self.ids()}
        used = sum(sizes.values())
        if used <= cache:
            return
        for adapter_id in sorted(sizes, key=self._last_read):
            if self._drop(adapter_id):
                used -= sizes[adapter_id]
            if used <= cache:
                return

    def _drop(self, adapter_id: AdapterId) -> bool:
        """Evict a copy unless it is being read. Readers that arrive meanwhile wait until it has left ``root``."""
        with self._lock:
            if self._readers[adapter_id]:
                return False
            self._leaving = adapter_id
        try:
            trash = self.detach(adapter_id)
        finally:
            with self._lock:
                self._leaving = None
                self._lock.notify_all()
        if trash is not None:
            shutil.rmtree(trash)
        return True

    def _note_read(self, adapter_id: AdapterId) -> None:
        with suppress(FileNotFoundError):
            now = time.time_ns()
            os.utime(self.path(adapter_id), ns=(now, now))  # the kernel's own clock is coarser

    def _last_read(self, adapter_id: AdapterId) -> int:
        try:
            return self.path(adapter_id).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _size(self, adapter_id: AdapterId) -> int:
        if adapter_id not in self._sizes:
            with suppress(FileNotFoundError):
                self._sizes[adapter_id] = folder_bytes(self.path(adapter_id))
        return self._sizes.get(adapter_id, 0)

    def _remember(self, spec: AdapterSpec) -> None:
        """Cache a spec: parsing its config takes longer than reading small weights. Bounded."""
        with self._lock:
            self._specs[spec.id] = spec
            if len(self._specs) > MAX_SPECS:
                self._specs.popitem(last=False)


def folder_bytes(folder: Path) -> int:
    """Return the size of an adapter's files in bytes."""
    files = [folder / name for name in (*FILES, *SHOWN)]
    return sum(path.stat().st_size for path in (*files, *folder.glob(f"{RECORDS}/*/*")) if path.exists())


def _copy(source: Path, target: Path, name: str, limit: int) -> None:
    with open_file(source, name) as reader, (target / name).open("xb") as writer:
        for chunk in chunks(reader, name, limit):
            writer.write(chunk)


@contextmanager
def translate_disk_full() -> Iterator[None]:
    """Turn an OSError for a full disk into :class:`StoreFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(f"no room to store the adapter: {error.strerror}") from error
        raise
