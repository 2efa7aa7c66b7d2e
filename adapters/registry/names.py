"""Names of adapters and aliases, and references to versions.

Names are ASCII, because letters of different scripts can look alike. They are case-sensitive, but two names that differ
only in case cannot both exist: ``legal`` and ``Legal`` are easily confused.
"""

import re
from dataclasses import dataclass

from adapters.errors import AdapterNameError, UnknownAdapter

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A name, as in ``legal``, or a version, as in ``legal@2``."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def parse_reference(text: str) -> Reference:
    """Parse a reference, whether it exists or not. Raises :class:`UnknownAdapter` for an invalid version."""
    name, at, version = text.partition("@")
    if not at:
        return Reference(name)
    if not _VERSION.fullmatch(version):
        raise UnknownAdapter(text)
    return Reference(name, int(version))


def case_folded(name: str) -> str:
    """Return the name in lower case, to compare names without regard to case."""
    return name.lower()


def is_possible_name(text: str) -> bool:
    """Return whether the text has the length and characters of a name. A database cannot compare every other text."""
    return len(text) <= MAX_NAME_LENGTH and _NAME.fullmatch(text) is not None


def check_name(name: str, reserved: frozenset[str] = frozenset()) -> None:
    """Raise :class:`AdapterNameError` if the name is invalid, or one of ``reserved``, the base's names."""
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
    if case_folded(name) in {case_folded(taken) for taken in reserved}:
        raise AdapterNameError(f"{name!r} cannot name an adapter: it is the base model's name")
