"""Select the adapter among the files received: trainers save other files beside it, and checkpoints in sub-folders.

The adapter nearest the top is taken, if there is only one at that depth. All other files are ignored, and named in the
receipt.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from adapters.errors import AdapterRejected, printable
from adapters.format.files import CONFIG, FILES, WEIGHTS, listing
from adapters.format.foreign_formats import PICKLE, recognise

MAX_NAMED = 100
"""Maximum number of ignored files, and of other adapters' folders, named in a receipt; the rest are only counted."""
MAX_PATH = 1024
"""Maximum number of characters of a file's path."""
_MAX_SHOWN = 10
"""Maximum number of folders named in an error message."""
_MACOS = "__MACOSX"
"""The folder in which macOS stores file metadata in a zip."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which folder the adapter was taken from, and which files were ignored."""

    folder: str = ""
    """The path of its folder; empty for the top."""
    ignored: tuple[str, ...] = ()
    """Paths of ignored files, at most :data:`MAX_NAMED`."""
    ignored_count: int = 0
    """Number of all ignored files."""
    others: tuple[str, ...] = ()
    """Folders of other adapters, which were ignored; at most :data:`MAX_NAMED`."""

    def receipt(self) -> dict[str, Any]:
        """Return these facts as fields of a receipt."""
        return {
            "taken_from": printable(self.folder) or ".",
            "other_adapters": list(self.others),
            "ignored_files": list(self.ignored),
            "ignored_count": self.ignored_count,
        }

    def with_ignored(self, ignored: Sequence[str], count: int, others: Sequence[str]) -> "Selection":
        """Return a copy that also counts files which the client had ignored before the upload."""
        return replace(
            self,
            ignored=_shown_paths([*ignored, *self.ignored]),
            ignored_count=self.ignored_count + max(count, len(ignored)),
            others=_shown_paths([*others, *self.others]),
        )


NO_OTHER_FILES = Selection()
"""The adapter at the top, and no other files."""


def select(paths: Collection[str]) -> Selection:
    """Select the adapter among files, given by their paths as :func:`normalise_path` returns them.

    Raises :class:`AdapterRejected` if there is none (and names a foreign format found instead), or if several
    have equally few folders above them.
    """
    names = _by_folder(paths)
    adapters = _adapter_folders(names)
    if not adapters:
        raise recognise(paths) or AdapterRejected("is missing", file=printable(_missing(names)))
    nearest = min(map(_depth, adapters))
    found = [folder for folder in adapters if _depth(folder) == nearest]
    if len(found) > 1:
        raise AdapterRejected(f"there are {len(found)} adapters in it: {_shown_folders(found)}; send one at a time")
    folder = found[0]
    _check_whole(folder, names[folder])
    return _selection(folder, paths, names)


def select_at_top(paths: Collection[str]) -> Selection:
    """Return the selection of an adapter that is known to be at the top."""
    return _selection("", paths, _by_folder(paths))


def select_in_folder(folder: Path) -> Selection:
    """Select the adapter at the top of a folder on this machine.

    Raises :class:`AdapterRejected` if there is none, and names folders below it that hold one.
    """
    selection = select(listing(folder))
    if selection.folder:
        reason = f"holds no adapter itself, but {printable(selection.folder)} in it does: give the path of that folder"
        raise AdapterRejected(reason, file=printable(folder.name))
    return selection


def normalise_path(path: str) -> str:
    """Return a path from an archive or form without empty parts and single dots; empty for the top.

    Raises :class:`AdapterRejected` for an absolute path, or one that leads out of its folder.
    """
    if path.startswith("/") or "\\" in path or "\0" in path or re.match("[A-Za-z]:", path):
        reject_path(path, "is not a relative path with / between its parts")
    if len(path) > MAX_PATH:
        reject_path(path, f"is a path of more than {MAX_PATH} characters")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        reject_path(path, "leads out of its folder")
    return "/".join(parts)


def reject_path(path: str, reason: str) -> NoReturn:
    """Raise :class:`AdapterRejected` for a file at an untrusted path."""
    raise AdapterRejected(reason, file=printable(path))


def _by_folder(paths: Collection[str]) -> Mapping[str, Counter[str]]:
    """Return folder -> number of times that each file of an adapter occurs in it."""
    folders: dict[str, Counter[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name in (*FILES, PICKLE) and _MACOS not in folder.split("/"):
            folders.setdefault(folder, Counter())[name] += 1
    return folders


def _selection(folder: str, paths: Collection[str], names: Mapping[str, Counter[str]]) -> Selection:
    own = {_join(folder, name) for name in FILES}
    ignored = [path for path in paths if path not in own]
    others = [each for each in _adapter_folders(names) if each != folder]
    return Selection(folder, _shown_paths(ignored), len(ignored), _shown_paths(others))


def _adapter_folders(names: Mapping[str, Counter[str]]) -> list[str]:
    """Return the folders that hold an adapter's weights."""
    return [folder for folder, found in names.items() if WEIGHTS in found or PICKLE in found]


def _missing(names: Mapping[str, Counter[str]]) -> str:
    """Return which file to report as missing if there are no weights: those of the nearest config, or a config."""
    nearest = min((folder for folder in names if CONFIG in names[folder]), key=_depth, default=None)
    return CONFIG if nearest is None else _join(nearest, WEIGHTS)


def _check_whole(folder: str, found: Counter[str]) -> None:
    if WEIGHTS not in found:
        raise recognise([_join(folder, PICKLE)]) or AdapterRejected(
            "is missing", file=printable(_join(folder, WEIGHTS))
        )
    if CONFIG not in found:
        reject_path(_join(folder, CONFIG), "is missing")
    for name in FILES:
        if found[name] > 1:
            reject_path(_join(folder, name), "occurs twice")


def _shown_paths(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the first :data:`MAX_NAMED` paths, as a receipt shows them."""
    return tuple(map(printable, paths[:MAX_NAMED]))


def _shown_folders(folders: Sequence[str]) -> str:
    more = len(folders) - _MAX_SHOWN
    return ", ".join(map(printable, folders[:_MAX_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _depth(folder: str) -> int:
    return len(folder.split("/")) if folder else 0


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
