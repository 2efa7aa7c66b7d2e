"""A watched folder: each folder in it is an adapter of that name, registered when it appears and when it changes."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNameError,
    AdapterUnavailable,
    RegistryUnavailable,
    StoreFull,
)
from adapters.format.files import FILES
from adapters.registry.names import check_name
from adapters.registry.registry import Registry
from adapters.sources.folder_states import FolderState

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two scans."""
SHARE = 0.02
"""Of a processor's time, what looking at folders in which nothing changes may take; with many, scans are rarer."""
SETTLE = 1.0
"""Seconds after which files that have not changed are taken to be complete."""
RETRY = 15.0
"""Seconds until a folder is tried again that the server's own state stood in the way of."""

_LATER = (StoreFull, RegistryUnavailable, AdapterUnavailable, AdapterConflict)
"""What is not the folder's fault: it is tried again although nothing in it has changed."""


@dataclass(frozen=True, slots=True)
class FolderRefusal:
    """A folder whose content could not be registered."""

    name: str
    source: str
    """Where it lies: the last part of the watched folder's path, and its own name."""
    reason: str
    since: int
    """Unix time, seconds."""


class WatchedFolder:
    """The folders in ``folder`` and what became of them. One thread scans; any thread may ask for the refusals.

    ``seen``, by a folder's full path, is what there was before a restart, and ``remember`` keeps it for the next; with
    None it forgets. What has been registered is left alone until it changes, so that a version an operator has gone
    back from, or removed, stays so; also where the folder goes away and comes back as it was.
    """

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        seen: Mapping[str, FolderState],
        remember: Callable[[str, FolderState | None], None],
    ) -> None:
        self._folder = folder
        self._registry = registry
        # The watched folder of another day may have been in this one.
        self._seen = {path: each for path, each in seen.items() if Path(path).parent == folder}
        self._remember = remember
        self._unsettled: dict[str, str] = {}
        """Signatures in the last scan of folders that may still be being written."""
        self._not_before: dict[str, float] = {}
        """Unix time, seconds, of the next attempt at what only the server's state stood in the way of."""
        self._readable = True
        self._looking = 0.0
        """Seconds of a processor that the last look at all folders took."""
        self._lock = threading.Lock()
        self._refusals: dict[str, FolderRefusal] = {}
        for path, each in self._seen.items():
            if each.refused is not None:
                self._refuse(Path(path).name, each.refused, each.since)

    def refusals(self) -> list[FolderRefusal]:
        """What is there now and cannot be served, in the order of names."""
        with self._lock:
            return [self._refusals[name] for name in sorted(self._refusals)]

    def run(self, stop: threading.Event) -> None:
        """Scan until ``stop`` is set."""
        while not stop.is_set():
            try:
                for _ in self._scan(time.time()):
                    if stop.is_set():
                        return
            except Exception:
                log.exception("Watching %s failed; it goes on", self._folder)
            stop.wait(max(INTERVAL, self._looking / SHARE))

    def scan(self, now: float) -> list[str]:
        """Look at all folders once, at ``now`` in unix time. Returns the names that were registered."""
        return [name for name, registered in self._scan(now) if registered]

    def _scan(self, now: float) -> Iterator[tuple[str, bool]]:
        """Try what is due. Yields after each: its name, and whether it is registered now."""
        begun = time.thread_time()
        names = self._names()
        if names is None:
            return
        changed = {name: signature for name in names if (signature := self._changed(name)) is not None}
        due = [
            name
            for name, signature in changed.items()
            if self._is_settled(name, signature, now) and self._not_before.get(name, 0.0) <= now
        ]
        self._looking = time.thread_time() - begun
        self._unsettled = {name: signature for name, signature in changed.items() if name not in due}
        self._forget_all_but(names)
        for name in due:
            yield name, self._take(name, now)

    def _names(self) -> set[str] | None:
        """Of the folders in the watched one; None where it cannot be read. What starts with a dot is not meant."""
        try:
            with os.scandir(self._folder) as entries:
                names = {entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)}
        except OSError as error:
            if self._readable:
                log.error("The watched folder %s cannot be read: %s", self._folder, error.strerror)
            self._readable = False
            return None
        if not self._readable:
            log.info("The watched folder %s can be read again", self._folder)
        self._readable = True
        return names

    def _changed(self, name: str) -> str | None:
        """The folder's signature, if it is not as it was when it was last taken."""
        path = self._path(name)
        signature = _signature(path)
        seen = self._seen.get(path)
        return None if seen is not None and seen.signature == signature else signature

    def _is_settled(self, name: str, signature: str, now: float) -> bool:
        return self._unsettled.get(name) == signature or _last_change(self._path(name)) < now - SETTLE

    def _take(self, name: str, now: float) -> bool:
        """Register a folder's content under its name; whether that went well."""
        # From before its files are read: what changes meanwhile is seen by the next scan.
        signature = _signature(self._path(name))
        try:
            reason = self._register(name)
            if reason is None:
                log.info("Registered %s from the watched folder", name)
            self._keep(name, FolderState(signature, reason, int(now)))
        except _LATER as error:
            # Not at once: each attempt copies the adapter.
            self._not_before[name] = now + RETRY
            reason = str(error)
        except Exception:
            # An engine without room for the dry load, or a fault of ours: not the folder's fault either.
            log.exception("Registering %r from the watched folder failed", name)
            self._not_before[name] = now + RETRY
            reason = "something went wrong on the server; it is in its log"
        self._refuse(name, reason, int(now))
        return reason is None

    def _register(self, name: str) -> str | None:
        """Why the folder's content cannot be registered before it changes; None where it has been."""
        try:
            check_name(name)
            self._registry.register_folder(name, Path(self._path(name)))
        except _LATER:
            raise
        except AdapterError as error:
            return str(error)
        return None

    def _keep(self, name: str, seen: FolderState | None) -> None:
        """Remember, but not by a name that no adapter can have: it need not even be text."""
        with suppress(AdapterNameError):
            check_name(name)
            self._remember(self._path(name), seen)
        if seen is None:
            self._seen.pop(self._path(name), None)
        else:
            self._seen[self._path(name)] = seen

    def _refuse(self, name: str, reason: str | None, since: int) -> None:
        """Show why it is not served; None: it is."""
        shown = self._refusals.get(name)
        if shown is not None and shown.reason == reason:
            return
        with self._lock:
            self._refusals.pop(name, None)
            if reason is not None:
                self._refusals[name] = FolderRefusal(name, f"{self._folder.name}/{name}", reason, since)
        if reason is not None:
            log.warning("The folder %r in the watched folder is refused: %s", name, reason)

    def _forget_all_but(self, names: set[str]) -> None:
        for name in self._refusals.keys() - names:
            try:
                self._keep(name, None)
            except RegistryUnavailable:
                # Shown until it can be forgotten for good.
                continue
            self._refuse(name, None, 0)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # It says why it cannot be read when it is registered.
        return True


def _signature(path: str) -> str:
    """What differs once one of the adapter's files in a folder is replaced or written to."""
    return ";".join(_file_signature(f"{path}/{name}") for name in FILES)


def _file_signature(path: str) -> str:
    try:
        info = os.stat(path)  # noqa: PTH116  (thousands of Path objects would cost more than looking)
    except OSError as error:
        return f"-{error.errno}"
    return f"{info.st_size}:{info.st_mtime_ns}:{info.st_ino}"


def _last_change(path: str) -> float:
    """Unix time, seconds, of the latest change to the folder or to one of the adapter's files in it."""
    return max(_changed_at(each) for each in (path, *(f"{path}/{name}" for name in FILES)))


def _changed_at(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError:
        return 0.0
