"""From the names in a request to adapter contents: looked up once, at one moment, and leased."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import UnknownAdapter
from adapters.registry import Adapter, Registry
from adapters.spec import AdapterId
from server.api.schemas import MixEntry
from server.errors import InvalidRequest, UnknownModel
from server.sequence import Adaptation, Adapted


@dataclass(frozen=True, slots=True)
class Applied:
    """One adapter that takes part in an answer."""

    name: str
    id: AdapterId
    weight: float


@dataclass(frozen=True, slots=True)
class Mix:
    """What a request's names stood for when it came in. Whoever has it gives ``leased`` back."""

    leased: tuple[Adapter, ...]
    applied: tuple[Applied, ...]
    """As asked for, in that order, without weights of 0."""

    @property
    def adaptation(self) -> Adaptation:
        """For the engine: one entry for each content, names of the same content added up."""
        weights: defaultdict[AdapterId, float] = defaultdict(float)
        for applied in self.applied:
            weights[applied.id] += applied.weight
        ranks = {adapter.spec.id: adapter.spec.rank for adapter in self.leased}
        return tuple(Adapted(id_, weight, ranks[id_]) for id_, weight in weights.items() if weight)


def lease_mix(registry: Registry, base: str, model: str | None, adapter: Sequence[MixEntry] | None) -> Mix:
    """The adapters that ``model`` and ``adapter`` name together; none for the base. All are leased, or none.

    ``model`` may be the base's name or, as vLLM's users write it, an adapter's. ``adapter`` empty is the base, said
    outright. Raises UnknownModel or UnknownAdapter, and InvalidRequest where the two fields disagree.
    """
    named = None if model in (None, base) else model
    if named is not None:
        _check_model(registry, named)
        if adapter is not None and {entry.name for entry in adapter} != {named}:
            raise InvalidRequest(
                f"`model` names the adapter `{named}` and `adapter` names others; name it once.", param="adapter"
            )
    entries = [MixEntry(name=named, weight=1.0)] if named is not None and adapter is None else list(adapter or ())
    try:
        leased = registry.acquire([entry.name for entry in entries])
    except UnknownAdapter as error:
        if error.name == named:
            raise UnknownModel(named) from error
        raise
    pairs = zip(leased, entries, strict=True)
    return Mix(leased, tuple(Applied(a.name, a.spec.id, entry.weight) for a, entry in pairs if entry.weight))


def _check_model(registry: Registry, name: str) -> None:
    try:
        registry.get(name)
    except UnknownAdapter as error:
        raise UnknownModel(name) from error
