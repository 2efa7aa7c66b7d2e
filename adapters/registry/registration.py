"""What a registration asks for, and what it returns."""

from dataclasses import dataclass

from adapters.registry.snapshot import Entry, Version


@dataclass(frozen=True, slots=True)
class RegistrationOptions:
    """What a registration may ask for."""

    activate: bool = True
    """Whether the name means this version from now on."""
    pinned: bool | None = None
    """Whether the active version stays on the device; None leaves it as it is."""
    preload: bool = False
    """Whether the adapter is loaded onto the device before the registration ends."""
    allow_base_mismatch: bool = False
    """Whether it is accepted although it says that it was trained on another base."""
    allow_unknown_fields: bool = False
    """Whether it is accepted although its config has unknown fields."""
    expected: int | None = None
    """The revision of the name that the caller has seen; 0 for a name that must be new."""


DEFAULT_OPTIONS = RegistrationOptions()


@dataclass(frozen=True, slots=True)
class Registered:
    """The result of a registration."""

    version: Version
    entry: Entry
    new: bool
    """False if the name already had this content as a version."""
