"""Which of the files that came are an adapter's: trainers leave much else beside it, and copies of it below.

The adapter is the one that lies nearest the top, if it is the only one there. All other files are left out, and named
in the receipt.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from adapters.errors import AdapterRejected, shown
from adapters.format.files import CONFIG, FILES, WEIGHTS, listing
from adapters.format.foreign_formats import PICKLE, recognise

MAX_NAMED = 100
"""Files that are left out, and folders with other adapters, that a receipt names; the rest are only counted."""
MAX_PATH = 1024
"""Characters of a file's path."""
_LISTED = 10
"""Folders that a refusal lists."""
_MACOS = "__MACOSX"
"""Where macOS puts what it knows of the files in a zip."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Where the adapter was in what came, and what was left out."""

    folder: str = ""
    """The path of its folder; empty for the top."""
    ignored: tuple[str, ...] = ()
    """Paths of files that were left out: the first of them."""
    ignored_count: int = 0
    """How many were left out in all."""
    others: tuple[str, ...] = ()
    """Folders of other adapters that were left out: the first of them."""

    def receipt(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "taken_from": shown(self.folder) or ".",
            "other_adapters": list(self.others),
            "ignored_files": list(self.ignored),
            "ignored_count": self.ignored_count,
        }

    def after(self, ignored: Sequence[str], count: int, others: Sequence[str]) -> "Selection":
        """The same, with what had been left out before."""
        return replace(
            self,
            ignored=_named([*ignored, *self.ignored]),
            ignored_count=self.ignored_count + max(count, len(ignored)),
            others=_named([*others, *self.others]),
        )


ALONE = Selection()
"""An adapter with nothing beside it."""


def choose(paths: Collection[str]) -> Selection:
    """The adapter among files by their paths, as :func:`plain` gives them.

    Raises :class:`AdapterRejected` where there is none, with the format of what is there if its names tell; and where
    several lie equally near the top.
    """
    names = _by_folder(paths)
    adapters = _adapters(names)
    if not adapters:
        raise recognise(paths) or AdapterRejected("is missing", file=shown(_missing(names)))
    nearest = min(map(_depth, adapters))
    found = [folder for folder in adapters if _depth(folder) == nearest]
    if len(found) > 1:
        raise AdapterRejected(f"there are {len(found)} adapters in it: {_listed(found)}; bring one at a time")
    folder = found[0]
    _check_whole(folder, names[folder])
    return _selected(folder, paths, names)


def beside(paths: Collection[str]) -> Selection:
    """What lies beside an adapter that was found at the top."""
    return _selected("", paths, _by_folder(paths))


def survey(folder: Path) -> Selection:
    """The adapter at the top of a folder on this machine, and what else there is.

    Raises :class:`AdapterRejected` where there is none; folders below it that have one are then named.
    """
    selection = choose(listing(folder))
    if selection.folder:
        reason = f"holds no adapter itself, but {shown(selection.folder)} in it does: give the path of that folder"
        raise AdapterRejected(reason, file=shown(folder.name))
    return selection


def plain(path: str) -> str:
    """A path out of an archive or a form without empty parts and single dots. Empty for the top.

    Raises :class:`AdapterRejected` for one that could lead elsewhere.
    """
    if path.startswith("/") or "\\" in path or "\0" in path or re.match("[A-Za-z]:", path):
        refuse(path, "is not a relative path of plain names")
    if len(path) > MAX_PATH:
        refuse(path, f"is a path of more than {MAX_PATH} characters")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        refuse(path, "leads out of its folder")
    return "/".join(parts)


def refuse(path: str, reason: str) -> NoReturn:
    """Raises :class:`AdapterRejected` for a file by a path that somebody else has written."""
    raise AdapterRejected(reason, file=shown(path))


def _by_folder(paths: Collection[str]) -> Mapping[str, Counter[str]]:
    """Folder -> how often each of the files that make an adapter is in it."""
    folders: dict[str, Counter[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name in (*FILES, PICKLE) and _MACOS not in folder.split("/"):
            folders.setdefault(folder, Counter())[name] += 1
    return folders


def _selected(folder: str, paths: Collection[str], names: Mapping[str, Counter[str]]) -> Selection:
    own = {_join(folder, name) for name in FILES}
    ignored = [path for path in paths if path not in own]
    others = [each for each in _adapters(names) if each != folder]
    return Selection(folder, _named(ignored), len(ignored), _named(others))


def _adapters(names: Mapping[str, Counter[str]]) -> list[str]:
    """Folders with an adapter's weights."""
    return [folder for folder, found in names.items() if WEIGHTS in found or PICKLE in found]


def _missing(names: Mapping[str, Counter[str]]) -> str:
    """The file to name where there are no weights: those of the nearest config, or a config."""
    nearest = min((folder for folder in names if CONFIG in names[folder]), key=_depth, default=None)
    return CONFIG if nearest is None else _join(nearest, WEIGHTS)


def _check_whole(folder: str, found: Counter[str]) -> None:
    if WEIGHTS not in found:
        raise recognise([_join(folder, PICKLE)]) or AdapterRejected("is missing", file=shown(_join(folder, WEIGHTS)))
    if CONFIG not in found:
        refuse(_join(folder, CONFIG), "is missing")
    for name in FILES:
        if found[name] > 1:
            refuse(_join(folder, name), "occurs twice")


def _named(paths: Sequence[str]) -> tuple[str, ...]:
    """As many as a receipt names."""
    return tuple(map(shown, paths[:MAX_NAMED]))


def _listed(folders: Sequence[str]) -> str:
    more = len(folders) - _LISTED
    return ", ".join(map(shown, folders[:_LISTED])) + (f" and {more} more" if more > 0 else "")


def _depth(folder: str) -> int:
    return len(folder.split("/")) if folder else 0


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
