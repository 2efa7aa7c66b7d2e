"""Errors about adapters.

::

    AdapterError
    ├── AdapterRejected      the content cannot be trusted; says which file, which tensor and why
    ├── AdapterNameError     the name cannot be used
    ├── SourceRefused        the place it should come from is not allowed, or cannot be read
    ├── UnknownAdapter       no adapter, version or alias goes by this name
    ├── AdapterUnavailable   there is one, but this server cannot serve it, and says why
    ├── AdapterConflict      something else stands in the way: an alias, an active version, pins
    ├── RevisionMismatch     somebody else has changed it since the caller looked
    ├── StoreFull            the disk has no room for the bytes
    │   └── QuotaExceeded        or the quota has not
    └── RegistryUnavailable  the database cannot be reached

After any of them nothing has changed; but where the database was lost just as it was to acknowledge a change,
RegistryUnavailable is raised although it may have been made.
"""

from bases.errors import ManyloraError, one_line

LONGEST_SHOWN = 160
"""Characters of a file's name that are told back."""


def shown(name: str) -> str:
    """A name out of an archive or a form, fit to be told back: no control characters, and not without end."""
    return "".join(character if character.isprintable() else "?" for character in name[:LONGEST_SHOWN])


class AdapterError(ManyloraError):
    """Anything that is wrong with an adapter."""

    def terminal_lines(self) -> list[str]:
        """Return the message as one line: names in it come from archives and from other people."""
        return [one_line(str(self))]


class AdapterRejected(AdapterError):
    """An adapter that cannot be served correctly, with the place and the reason.

    ``file`` and ``tensor`` name the place where they are known; ``code`` tells programs of a reason they may act on.
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
    """A name that no adapter can carry."""

    exit_status = 2


class SourceRefused(AdapterError):
    """An address that is not allowed, or that gave no adapter."""


class UnknownAdapter(AdapterError):
    """No adapter, version or alias goes by this name."""

    exit_status = 2

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The adapter `{name}` does not exist." if name else "The name of the adapter is empty.")


class AdapterUnavailable(AdapterError):
    """A known adapter that this server cannot serve."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"The adapter `{name}` cannot be served: {reason}.")


class AdapterConflict(AdapterError):
    """Something else stands in the way. ``code`` says what, for programs."""

    def __init__(self, message: str, *, code: str) -> None:
        self.code = code
        super().__init__(message)


class RevisionMismatch(AdapterError):
    """The name is not what it was when the caller looked."""


class StoreFull(AdapterError):
    """There is no room for the adapter's bytes."""


class QuotaExceeded(StoreFull):
    """The adapter's bytes do not fit what the store may hold."""


class RegistryUnavailable(AdapterError):
    """The registry's database cannot be reached: what is registered is served, nothing can be changed."""
