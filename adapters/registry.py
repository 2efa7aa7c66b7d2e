"""Which adapter goes by which name, and who uses it. In memory."""

import logging
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterError, AdapterNameError, UnknownAdapter
from adapters.spec import AdapterId, AdapterSpec
from adapters.store import AdapterStore

_log = logging.getLogger(__name__)

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and the content it stood for when it was looked up."""

    name: str
    spec: AdapterSpec
    created: int
    """Unix time, seconds."""


def _ignore(adapter_id: AdapterId) -> None:
    """Nobody else holds what the store holds."""


class Registry:
    """Names and leases over a store. Any thread may call any method.

    A content's bytes stay for as long as a name or a lease refers to it, and go with the last of them.
    """

    def __init__(
        self,
        store: AdapterStore,
        *,
        reserved: frozenset[str] = frozenset(),
        on_unused: Callable[[AdapterId], None] = _ignore,
    ) -> None:
        """``reserved`` names can be given to no adapter; ``on_unused`` is told of each content whose bytes are gone."""
        self._store = store
        self._reserved = reserved
        self._on_unused = on_unused
        self._lock = threading.Lock()
        self._names: dict[str, Adapter] = {}
        self._leases: Counter[AdapterId] = Counter()
        self._references: Counter[AdapterId] = Counter()
        """Names and leases together."""

    def register(self, name: str, folder: Path) -> tuple[Adapter, bool]:
        """Store a PEFT folder's content under ``name``; True where the name was known and is now re-pointed.

        Slow: copies and verifies. Raises :class:`AdapterNameError`, :class:`AdapterRejected` or :class:`StoreFull`,
        and then nothing has changed. Of two at once for one name, the later to finish stays.
        """
        self._check_name(name)
        while True:
            spec = self._store.add(folder)
            with self._lock:
                # The same content may have lost its last reference, and its bytes, since add() saw it.
                if spec.id not in self._store:
                    continue
                previous = self._names.get(name)
                adapter = self._names[name] = Adapter(name, spec, int(time.time()))
                self._references[spec.id] += 1
                trash = self._drop([previous.spec.id] if previous else [])
            self._discard(trash)
            return adapter, previous is not None

    def get(self, name: str) -> Adapter:
        """Raises :class:`UnknownAdapter`."""
        with self._lock:
            return self._known(name)

    def list(self) -> list[Adapter]:
        """All adapters, in the order of their names."""
        with self._lock:
            return [self._names[name] for name in sorted(self._names)]

    def remove(self, name: str) -> None:
        """Forget the name. Those who hold a lease keep their content. Raises :class:`UnknownAdapter`."""
        with self._lock:
            adapter = self._known(name)
            del self._names[name]
            trash = self._drop([adapter.spec.id])
        self._discard(trash)

    def acquire(self, names: Sequence[str]) -> tuple[Adapter, ...]:
        """Look up all names at one moment and lease their contents, one lease for each item. All or none.

        Raises :class:`UnknownAdapter`.
        """
        with self._lock:
            adapters = tuple(self._known(name) for name in names)
            ids = [adapter.spec.id for adapter in adapters]
            self._leases.update(ids)
            self._references.update(ids)
        return adapters

    def release(self, adapters: Iterable[Adapter]) -> None:
        """Give back what :meth:`acquire` returned, once. Raises :class:`ValueError` for a lease that is not held."""
        ids = [adapter.spec.id for adapter in adapters]
        with self._lock:
            if not Counter(ids) <= self._leases:
                raise ValueError("released more leases than were acquired")
            self._leases -= Counter(ids)
            trash = self._drop(ids)
        self._discard(trash)

    def _check_name(self, name: str) -> None:
        if not name or len(name) > MAX_NAME_LENGTH:
            raise AdapterNameError(f"an adapter's name has 1 to {MAX_NAME_LENGTH} characters, not {len(name)}")
        if not _NAME.fullmatch(name):
            raise AdapterNameError(
                f"{name!r} cannot name an adapter: only ASCII letters, digits and . _ - / can be used, "
                "and the first is a letter or a digit"
            )
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise AdapterNameError(f"{name!r} cannot name an adapter: it has an empty, `.` or `..` part")
        if name in self._reserved:
            raise AdapterNameError(f"{name!r} cannot name an adapter: it is the base model's name")

    def _known(self, name: str) -> Adapter:
        try:
            return self._names[name]
        except KeyError:
            raise UnknownAdapter(name) from None

    def _drop(self, ids: Iterable[AdapterId]) -> dict[AdapterId, Path | None]:
        """Take one reference from each; with the lock held.

        Contents left without any leave the store here, so that nobody can find one that is about to go; their bytes,
        which take longer, go in :meth:`_discard`.
        """
        self._references.subtract(ids)
        unused = {adapter_id for adapter_id in ids if not self._references[adapter_id]}
        for adapter_id in unused:
            del self._references[adapter_id]
        return {adapter_id: self._detach(adapter_id) for adapter_id in unused}

    def _detach(self, adapter_id: AdapterId) -> Path | None:
        try:
            return self._store.detach(adapter_id)
        except (AdapterError, OSError):
            # Somebody else's hand in the store. The adapter is out of use all the same, so the caller has succeeded.
            _log.exception("could not take adapter %s out of the store", adapter_id)
            return None

    def _discard(self, trash: dict[AdapterId, Path | None]) -> None:
        for adapter_id, path in trash.items():
            try:
                if path is not None:
                    shutil.rmtree(path)
            except OSError:
                # The adapter is out of use all the same; the next sweep tries again.
                _log.exception("could not delete %s", path)
            self._on_unused(adapter_id)
