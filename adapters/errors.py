"""Errors about adapters.

::

    AdapterError
    ├── AdapterRejected      the content cannot be served; names the file, the tensor and the reason
    ├── AdapterNameError     the name is invalid or reserved
    ├── SourceRefused        the source address is not allowed, or cannot be read
    ├── UnknownAdapter       no adapter, version or alias has this name
    ├── AdapterUnavailable   it exists, but this server cannot serve it; gives the reason
    ├── AdapterConflict      it conflicts with an alias, an active version or the pins
    ├── RevisionMismatch     the name has changed since the caller last read it
    ├── StoreFull            the disk has no room for the adapter
    │   └── QuotaExceeded    the quota has no room for it
    └── RegistryUnavailable  the database cannot be reached

When one of them is raised, nothing has changed. One exception: if the connection to the database is lost while it
acknowledges a change, RegistryUnavailable is raised although the change may have been made.
"""

from bases.errors import ManyloraError, one_line

MAX_PRINTED = 160
"""Maximum number of characters of a file's name in a message."""


def printable(name: str) -> str:
    """Return an untrusted name for a message: cut to :data:`MAX_PRINTED`, ``?`` for each unprintable character."""
    return "".join(character if character.isprintable() else "?" for character in name[:MAX_PRINTED])


class AdapterError(ManyloraError):
    """Base class of all errors about adapters."""

    def terminal_lines(self) -> list[str]:
        """Return the message as one line: it may contain names out of archives and from other users."""
        return [one_line(str(self))]


class AdapterRejected(AdapterError):
    """The adapter's content cannot be served correctly.

    ``file`` and ``tensor`` say where the problem is, if that is known; ``code`` identifies the reason for programs.
    """

    def __init__(
        self, reason: str, *, file: str | None = None, tensor: str | None = None, code: str = "adapter_rejected"
    ) -> None:
        self.reason = reason
        self.file = file
        self.tensor = tensor
        self.code = code
        place = ": ".join(part for part in (file, tensor) if part)
        super().__init__(f"{place}: {reason}" if place else reason)


class AdapterNameError(AdapterError):
    """The name is invalid or reserved. ``other``: a name in the message besides the one that the caller gave."""

    exit_status = 2

    def __init__(self, message: str, *, other: str | None = None) -> None:
        self.other = other
        super().__init__(message)


class SourceRefused(AdapterError):
    """The source address is not allowed, cannot be read, or holds no adapter."""


class UnknownAdapter(AdapterError):
    """No adapter, version or alias has this name."""

    exit_status = 2

    def __init__(self, name: str, *, hint: str = "") -> None:
        self.name = name
        message = f"The adapter `{name}` does not exist{hint}." if name else "The name of the adapter is empty."
        super().__init__(message)


class AdapterUnavailable(AdapterError):
    """The adapter exists, but this server cannot serve it."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"The adapter `{name}` cannot be served: {reason}.")


class AdapterConflict(AdapterError):
    """The change conflicts with an alias, an active version or the pins; ``code`` says with which."""

    def __init__(self, message: str, *, code: str, other: str | None = None) -> None:
        """``other``: a name in the message besides the one that the caller gave."""
        self.code = code
        self.other = other
        super().__init__(message)


class RevisionMismatch(AdapterError):
    """The name has changed since the caller last read it."""


class StoreFull(AdapterError):
    """The disk has no room for the adapter."""


class QuotaExceeded(StoreFull):
    """The adapter would exceed the store's quota."""


class RegistryUnavailable(AdapterError):
    """The registry's database cannot be reached. Registered adapters are still served, but nothing can be changed."""
