"""Errors about adapters.

::

    AdapterError
    ├── AdapterRejected    the folder cannot be trusted; says which file, which tensor and why
    ├── AdapterNameError   the name cannot be used
    ├── UnknownAdapter     no adapter goes by this name
    └── StoreFull          the disk (or quota) has no room for the bytes; nothing was changed
"""


class AdapterError(Exception):
    """Anything that is wrong with an adapter."""


class AdapterRejected(AdapterError):
    """An adapter that cannot be served correctly, with the place and the reason.

    ``file`` and ``tensor`` name the place where they are known.
    """

    def __init__(self, reason: str, *, file: str | None = None, tensor: str | None = None) -> None:
        self.reason = reason
        self.file = file
        self.tensor = tensor
        place = ": ".join(part for part in (file, tensor) if part)
        super().__init__(f"{place}: {reason}" if place else reason)


class AdapterNameError(AdapterError):
    """A name that no adapter can carry."""


class UnknownAdapter(AdapterError):
    """No adapter goes by this name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The adapter `{name}` does not exist.")


class StoreFull(AdapterError):
    """There is no room for the adapter's bytes. Nothing was changed."""
