"""TrainingRuns: what ``manylora train`` has left in a folder, read as the server's routes show it.

A run that goes on works in ``NAME.training`` (see training/run/run_folder.py); a finished one is the adapter's folder,
``NAME``.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapters.errors import AdapterError, AdapterNameError
from adapters.format.content import content_id
from adapters.format.files import CONFIG, ORIGIN, REQUIRED, WEIGHTS
from adapters.format.spec import AdapterId
from adapters.format.training_record import (
    ADAPTER,
    LOCK,
    LOG,
    REQUEST,
    WORKING,
    Point,
    TrainingLog,
    read_log,
    read_manifest,
    read_samples,
)
from adapters.registry.names import check_name
from server.errors import UnknownRun

MAX_TEXT = 4000
"""Maximum number of characters of a text in a list."""
MAX_DEPTH = 8
"""Maximum number of parts of a name: ``team/legal`` has two."""
MAX_FOLDERS = 10_000
"""Maximum number of folders that are looked into."""

State = Literal["running", "interrupted", "finished", "failed"]


@dataclass(frozen=True)
class TrainingRun:
    """One run as the disk has it."""

    name: str
    folder: Path
    state: State
    log: TrainingLog
    manifest: dict[str, Any] | None
    changed: int
    """Unix time in seconds of the last line of its log."""

    def summary(self) -> dict[str, Any]:
        """Return what a list shows."""
        log, manifest, started = self.log, self.manifest or {}, self.log.started
        best: Point | None = min(log.evaluation, key=lambda point: point[1], default=None)
        ended = self.state in ("finished", "failed")
        return {
            "id": self.name,
            "object": "training_run",
            "state": self.state,
            "judging": self.state == "running" and log.event == "judging",
            "base": _text(started.get("base")) or _text(_object(manifest, "base").get("name")),
            "base_fingerprint": _text(started.get("base_fingerprint")) or _text(manifest.get("base_fingerprint")),
            "step": log.step,
            "steps": _whole(started.get("steps")),
            "loss": log.loss[-1][1] if log.loss else None,
            "best_evaluation": None if best is None else {"step": best[0], "loss": best[1]},
            "started": None if log.first_time is None else int(log.first_time),
            "ended": self.changed if ended else None,
            "updated": self.changed,
            "passed": _truth(_object(manifest, "evaluation").get("passed")),
            "reason": _text(log.reason) if self.state == "failed" else None,
            "skipped_lines": log.skipped_lines,
            "skipped_bytes": log.skipped_bytes,
        }

    def details(self) -> dict[str, Any]:
        """Return all that is known of it. Reads files."""
        manifest = self.manifest or {}
        return {
            **self.summary(),
            "settings": _object(self.log.started, "settings") or _object(manifest, "settings") or None,
            "data": _object(self.log.started, "data") or _object(manifest, "data") or None,
            "curves": self.log.curves(),
            "samples": self._samples() or [],
            "evaluation": _object(manifest, "evaluation") or None,
            "manifest": self.manifest,
        }

    def content(self) -> AdapterId | None:
        """Return the identity of a finished run's adapter. Reads its weights."""
        if self.state != "finished":
            return None
        try:
            return content_id(self.folder)
        except (AdapterError, OSError):  # it has just been moved or removed
            return None

    def _samples(self) -> list[Any] | None:
        found = read_samples(self.folder)
        if found is None and _is_folder(self.folder / ADAPTER):
            return read_samples(self.folder / ADAPTER)
        return found


@dataclass(frozen=True)
class Place:
    """Where a run is, found without reading its files."""

    name: str
    folder: Path
    state: Literal["running", "stopped", "finished"]
    files: tuple[object, ...]
    """Identity, size and time of the log and of the manifest: what is read of them stays true while this is equal."""
    changed: int
    """When its log was last written, in nanoseconds."""


class TrainingRuns:
    """The runs under a folder. Links are not followed, so nothing outside is read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._contents: dict[str, tuple[object, AdapterId | None]] = {}
        """Name -> the state of its weights, and its content."""
        self._summaries: dict[str, tuple[object, dict[str, Any]]] = {}
        """Name -> what it was read from, and what a list shows."""

    def places(self) -> tuple[list[Place], bool]:
        """Return where all runs are, those whose logs were written last first; and whether that is all of them.

        It is not if there are more than :data:`MAX_FOLDERS` folders, or deeper ones than :data:`MAX_DEPTH`. Reads no
        log.
        """
        walk = _Walk(self._root)
        names = {name for name in walk.names() if _is_name(name)}
        for gone in self._summaries.keys() - names:
            self._summaries.pop(gone, None)
        found = [place for place in map(self._place, names) if place is not None]
        return sorted(found, key=lambda place: (-place.changed, place.name)), walk.complete

    def summary(self, place: Place) -> dict[str, Any] | None:
        """Return what a list shows of a run; None if it is gone. Its files are read only if they have changed."""
        state = (place.state, place.folder, place.files)
        known, summary = self._summaries.get(place.name, (None, None))
        if known == state:
            return summary
        run = _read(place)
        if run is None:
            return None
        summary = run.summary()
        self._summaries[place.name] = (state, summary)
        return summary

    def find(self, name: str) -> TrainingRun:
        """Return a run. Raises UnknownRun."""
        place = self._place(name) if _is_name(name) else None
        run = None if place is None else _read(place)
        if run is None:
            raise UnknownRun(name)
        return run

    def content(self, run: TrainingRun) -> AdapterId | None:
        """Return the identity of a finished run's adapter, which is computed once."""
        if run.state != "finished":
            return None
        state = _identity(run.folder / WEIGHTS), _identity(run.folder / CONFIG), run.changed
        if self._contents.get(run.name, (None, None))[0] != state:
            self._contents[run.name] = (state, run.content())
        return self._contents[run.name][1]

    def _place(self, name: str) -> Place | None:
        try:
            working, finished = self._folder(name + WORKING), self._folder(name)
            if finished is not None and _is_finished(finished):
                return _placed(name, finished, finished, "finished")
            if working is None or not _works_in(working):
                return None
            adapter = working / ADAPTER
            return _placed(name, working, adapter, "running" if _is_locked(working / LOCK) else "stopped")
        except OSError:  # it has just been moved or removed
            return None

    def _folder(self, name: str) -> Path | None:
        """Return the folder of this name, unless a part of its path is a link."""
        path = self._root
        for part in name.split("/"):
            path = path / part
            if path.is_symlink():
                return None
        return path if path.is_dir() else None


class _Walk:
    """Looks for runs in a folder and its sub-folders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.complete = True
        """Whether every folder has been looked into."""

    def names(self) -> Iterator[str]:
        waiting, seen = [(self._root, "", 0)], 0
        while waiting:
            folder, prefix, depth = waiting.pop()
            for entry in _folders(folder):
                seen += 1
                if seen > MAX_FOLDERS or depth == MAX_DEPTH:
                    self.complete = False
                    break
                path, name = Path(entry.path), f"{prefix}{entry.name}"
                if _works_in(path) and name.endswith(WORKING):
                    yield name.removesuffix(WORKING)
                elif _is_finished(path):
                    yield name
                else:
                    waiting.append((path, f"{name}/", depth + 1))
            if seen > MAX_FOLDERS:
                return


def _placed(name: str, folder: Path, adapter: Path, state: Literal["running", "stopped", "finished"]) -> Place:
    log = _stat(folder / LOG)
    manifest = _identity(adapter / ORIGIN) if _is_folder(adapter) else None
    changed = (log or folder.stat()).st_mtime_ns
    return Place(name, folder, state, (_identity(folder / LOG), manifest, changed), changed)


def _read(place: Place) -> TrainingRun | None:
    log = read_log(place.folder) or TrainingLog()
    adapter = place.folder if place.state == "finished" else place.folder / ADAPTER
    manifest = read_manifest(adapter) if _is_folder(adapter) else None
    state: State = "interrupted"
    if place.state != "stopped":
        state = place.state
    elif log.event == "failed":
        state = "failed"
    if not _is_folder(place.folder):
        return None
    changed = place.changed / 1e9 if log.last_time is None else log.last_time
    return TrainingRun(place.name, place.folder, state, log, manifest, int(changed))


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except AdapterNameError:
        return False
    return True


def _works_in(folder: Path) -> bool:
    return (folder / REQUEST).is_file() or (folder / LOCK).is_file()


def _is_finished(folder: Path) -> bool:
    return all(_is_file(folder / name) for name in REQUIRED)


def _is_file(path: Path) -> bool:
    found = _stat(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def _is_folder(path: Path) -> bool:
    found = _stat(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _identity(path: Path) -> object:
    """Return what is another once the file has changed."""
    found = _stat(path)
    return None if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _is_locked(lock: Path) -> bool:
    """Return whether a trainer holds its lock. Takes it for an instant, shared, which trainers wait for."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _folders(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    return value[:MAX_TEXT] if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _truth(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
