"""RegistryHooks: what a registry is told by the server around it, and tells it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.format.spec import AdapterId, AdapterSpec
from adapters.registry.catalog import Fits
from adapters.registry.snapshot import Version


@dataclass(frozen=True, slots=True)
class RegistryHooks:
    """What a registry needs to know from, and tell, the server around it."""

    base: str
    """The base's fingerprint."""
    equivalents: frozenset[str] = frozenset()
    """Other fingerprints that mean this base."""
    max_rank: int = 256
    """The largest rank that is served."""
    reserved: frozenset[str] = frozenset()
    """Names that nothing can be given."""
    probe: Callable[[AdapterSpec, bool], Mapping[str, Any]] = lambda spec, keep: {}
    """The dry load of a stored content; the flag says whether it is to stay on the device. Raises AdapterRejected."""
    fits: Fits = lambda ranks: True
    """Whether adapters of these ranks may be pinned together."""
    on_pins: Callable[[Sequence[Version]], None] = lambda versions: None
    """Told which versions are to stay on the device whenever that changes."""
    on_unused: Callable[[AdapterId], None] = lambda content: None
    """Told of each content that nothing here refers to any more, before its bytes go. Must be quick."""
