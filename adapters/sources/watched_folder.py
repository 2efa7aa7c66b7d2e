"""WatchedFolder: register each folder below a root as an adapter of that name, when it appears and when it changes."""

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

SCAN_SECONDS = 1.0
"""Minimum seconds between two scans."""
MAX_CPU_SHARE = 0.02
"""Maximum share of a core's time that scans may use if nothing changes; with many folders, scans are less frequent."""
SETTLE_SECONDS = 1.0
"""Seconds after which files that have not changed are considered complete."""
RETRY_SECONDS = 15.0
"""Seconds until a registration that failed because of the server's state is tried again."""

_RETRIED_ERRORS = (StoreFull, RegistryUnavailable, AdapterUnavailable, AdapterConflict)
"""Errors caused by the server's state: the folder is tried again although nothing in it has changed."""


@dataclass(frozen=True, slots=True)
class FolderRefusal:
    """A folder that could not be registered."""

    name: str
    source: str
    """The name of the watched folder and its own, as ``watched/legal``."""
    reason: str
    since: int
    """Unix time, seconds."""


class WatchedFolder:
    """Registers the folders in ``folder``. One thread scans; any thread may call :meth:`refusals`.

    ``states`` holds the last state of each folder, by its full path, from before a restart; ``save`` stores a new
    state, or deletes it if given None. A folder is registered again only if its files have changed since then. So a
    version that an operator rolled back or removed stays so, also if its folder is moved away and back unchanged.
    """

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        states: Mapping[str, FolderState],
        save: Callable[[str, FolderState | None], None],
    ) -> None:
        self._folder = folder
        self._registry = registry
        # Skip states of nested folders: an earlier run may have watched a folder inside this one.
        self._states = {path: state for path, state in states.items() if Path(path).parent == folder}
        self._save = save
        self._unsettled: dict[str, str] = {}
        """Name -> signature in the last scan, of folders that may still be written to."""
        self._retry_at: dict[str, float] = {}
        """Name -> Unix time, seconds, of the next attempt after one of :data:`_RETRIED_ERRORS`."""
        self._readable = True
        self._scan_seconds = 0.0
        """CPU seconds that the last scan took, without registrations."""
        self._lock = threading.Lock()
        self._refusals: dict[str, FolderRefusal] = {}
        for path, state in self._states.items():
            if state.refused is not None:
                self._set_refusal(Path(path).name, state.refused, state.since)

    def refusals(self) -> list[FolderRefusal]:
        """Return the folders that exist now and could not be registered, in the order of their names."""
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
                log.exception("Scanning the watched folder %s failed; will scan again", self._folder)
            stop.wait(max(SCAN_SECONDS, self._scan_seconds / MAX_CPU_SHARE))

    def scan(self, now: float) -> list[str]:
        """Check all folders once; return the names that were registered. ``now``: Unix time, seconds."""
        return [name for name, registered in self._scan(now) if registered]

    def _scan(self, now: float) -> Iterator[tuple[str, bool]]:
        """Register the folders that are due. Yields (name, whether it was registered) after each."""
        begun = time.thread_time()
        names = self._list_folders()
        if names is None:
            return
        changed = {name: signature for name in names if (signature := self._changed_signature(name)) is not None}
        due = [
            name
            for name, signature in changed.items()
            if self._is_settled(name, signature, now) and not self._waits_for_retry(name, now)
        ]
        self._scan_seconds = time.thread_time() - begun
        self._unsettled = {name: signature for name, signature in changed.items() if name not in due}
        self._forget_removed(names)
        for name in due:
            yield name, self._try_register(name, now)

    def _list_folders(self) -> set[str] | None:
        """Return the names of the folders in the watched one, without hidden ones; None if it cannot be read."""
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

    def _changed_signature(self, name: str) -> str | None:
        """Return the folder's signature if it has changed since the saved state, else None."""
        path = self._path(name)
        signature = folder_signature(path)
        state = self._states.get(path)
        return None if state is not None and state.signature == signature else signature

    def _is_settled(self, name: str, signature: str, now: float) -> bool:
        return self._unsettled.get(name) == signature or _last_change(self._path(name)) < now - SETTLE_SECONDS

    def _waits_for_retry(self, name: str, now: float) -> bool:
        """Whether the next attempt is still to come. Not if it is too far away: then the clock was set back."""
        return 0 < self._retry_at.get(name, now) - now <= RETRY_SECONDS

    def _try_register(self, name: str, now: float) -> bool:
        """Register a folder and record the outcome; return whether it was registered."""
        # Computed before the files are read, so that the next scan notices a change made meanwhile.
        signature = folder_signature(self._path(name))
        try:
            reason = self._register(name)
            if reason is None:
                log.info("Registered %s from the watched folder", name)
            self._save_state(name, FolderState(signature, reason, int(now)))
        except _RETRIED_ERRORS as error:
            # Wait before the next attempt: each one copies the adapter.
            self._retry_at[name] = now + RETRY_SECONDS
            reason = str(error)
        except Exception:
            # The device was too full for the dry load, or there is a bug: trying again may help.
            log.exception("Registering %r from the watched folder failed", name)
            self._retry_at[name] = now + RETRY_SECONDS
            reason = "something went wrong on the server; it is in its log"
        self._set_refusal(name, reason, int(now))
        return reason is None

    def _register(self, name: str) -> str | None:
        """Register a folder; return why that cannot succeed until its files change, None if it was registered."""
        try:
            check_name(name)
            self._registry.register_folder(name, Path(self._path(name)))
        except _RETRIED_ERRORS:
            raise
        except AdapterError as error:
            return str(error)
        return None

    def _save_state(self, name: str, state: FolderState | None) -> None:
        """Save a folder's state, in memory only if its name is invalid: the database may be unable to store it."""
        with suppress(AdapterNameError):
            check_name(name)
            self._save(self._path(name), state)
        if state is None:
            self._states.pop(self._path(name), None)
        else:
            self._states[self._path(name)] = state

    def _set_refusal(self, name: str, reason: str | None, since: int) -> None:
        """List the folder as refused for ``reason``; None removes it from the list."""
        listed = self._refusals.get(name)
        if listed is not None and listed.reason == reason:
            return
        with self._lock:
            self._refusals.pop(name, None)
            if reason is not None:
                self._refusals[name] = FolderRefusal(name, f"{self._folder.name}/{name}", reason, since)
        if reason is not None:
            log.warning("The folder %r in the watched folder is refused: %s", name, reason)

    def _forget_removed(self, names: set[str]) -> None:
        """Drop the refusals of folders that are not among ``names``, and when they were to be tried again."""
        self._retry_at = {name: at for name, at in self._retry_at.items() if name in names}
        for name in self._refusals.keys() - names:
            try:
                self._save_state(name, None)
            except RegistryUnavailable:
                # Listed until its state can be deleted.
                continue
            self._set_refusal(name, None, 0)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # Registering it will give the reason.
        return True


def folder_signature(path: str) -> str:
    """Return a string that changes when one of the adapter's files in the folder is replaced or written to."""
    return ";".join(_file_signature(f"{path}/{name}") for name in FILES)


def _file_signature(path: str) -> str:
    try:
        info = os.stat(path)  # noqa: PTH116  (Path objects cost more than the call itself)
    except OSError as error:
        return f"-{error.errno}"
    return f"{info.st_size}:{info.st_mtime_ns}:{info.st_ino}"


def _last_change(path: str) -> float:
    """Return when the folder or one of the adapter's files in it last changed: Unix time, seconds."""
    return max(_modified(each) for each in (path, *(f"{path}/{name}" for name in FILES)))


def _modified(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError:
        return 0.0
