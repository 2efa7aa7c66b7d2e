"""Names: what adapters and aliases may be called, and how a version is written.

Names are ASCII, so no two that look alike differ by script. They are case-sensitive, but two that differ in case only
cannot both exist: ``legal`` and ``Legal`` are too easily taken for each other.
"""

import re
from dataclasses import dataclass

from adapters.errors import AdapterNameError, UnknownAdapter

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Reference:
    """``legal``, or ``legal@2``."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def parse_reference(text: str) -> Reference:
    """Whether such a name exists is not asked. Raises :class:`UnknownAdapter` for what no name can be."""
    name, at, version = text.partition("@")
    if not at:
        return Reference(name)
    if not _VERSION.fullmatch(version):
        raise UnknownAdapter(text)
    return Reference(name, int(version))


def fold(name: str) -> str:
    """The same for names that differ in case only."""
    return name.lower()


def could_be_name(text: str) -> bool:
    """Whether a name could be spelled like this. A database cannot even look for every other text."""
    return len(text) <= MAX_NAME_LENGTH and _NAME.fullmatch(text) is not None


def check_name(name: str, reserved: frozenset[str] = frozenset()) -> None:
    """Raises :class:`AdapterNameError` where ``name`` can be given to nothing; ``reserved`` are the base's names."""
    if not name or len(name) > MAX_NAME_LENGTH:
        raise AdapterNameError(f"an adapter's name has 1 to {MAX_NAME_LENGTH} characters, not {len(name)}")
    if "@" in name:
        raise AdapterNameError(f"{name!r} cannot name an adapter: @ is for versions, which are numbered by the server")
    if not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"{name!r} cannot name an adapter: only ASCII letters, digits and . _ - / can be used, "
            "and the first is a letter or a digit"
        )
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise AdapterNameError(f"{name!r} cannot name an adapter: it has an empty, `.` or `..` part")
    if fold(name) in {fold(taken) for taken in reserved}:
        raise AdapterNameError(f"{name!r} cannot name an adapter: it is the base model's name")
