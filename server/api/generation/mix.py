"""From the names in a request to adapter contents: looked up once, at one moment, and leased."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.directory import Lease
from adapters.registry.registry import Registry
from server.api.schemas.generation import GenerationRequest, MixEntry
from server.engine.sequence import Adaptation, WeightedAdapter
from server.errors import InvalidRequest, UnknownModel


@dataclass(frozen=True, slots=True)
class Applied:
    """One adapter that takes part in an answer."""

    name: str
    """Of the version, as in ``legal@2``."""
    id: AdapterId
    weight: float
    alias: str | None
    """The alias that it was asked for by."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What a request's names stood for when it came in. Whoever has it gives ``leased`` back."""

    leased: tuple[Lease, ...]
    applied: tuple[Applied, ...]
    """As asked for, in that order, without weights of 0."""

    @property
    def adaptation(self) -> Adaptation:
        """For the engine: one entry for each content, names of the same content added up."""
        weights: defaultdict[AdapterId, float] = defaultdict(float)
        for applied in self.applied:
            weights[applied.id] += applied.weight
        ranks = {lease.version.content: lease.version.rank for lease in self.leased}
        return tuple(WeightedAdapter(id_, weight, ranks[id_]) for id_, weight in weights.items() if weight)


def lease_mix(registry: Registry, base: str, request: GenerationRequest) -> Mix:
    """The adapters that ``model`` and ``adapter`` of a request name together; none for the base. All leased, or none.

    A name is an adapter's, a version's or an alias's. ``model`` may be the base's name or, as vLLM's users write it,
    one of those. ``adapter`` empty is the base, said outright. Raises UnknownModel, UnknownAdapter or
    AdapterUnavailable, and InvalidRequest where the two fields disagree.
    """
    named = None if request.model in (None, base) else request.model
    if named is not None:
        _check_model(registry, named, request.adapter)
    if named is not None and request.adapter is None:
        entries = [MixEntry(name=named, weight=1.0)]
    else:
        entries = list(request.adapter or ())
    names = list(dict.fromkeys(entry.name for entry in entries))  # an alias means one thing throughout a request
    try:
        leased = registry.acquire(names, request.user or None)
    except UnknownAdapter as error:
        if error.name == named:
            raise UnknownModel(named) from error
        raise
    meant = dict(zip(names, leased, strict=True))
    return Mix(leased, tuple(_applied(meant[entry.name], entry) for entry in entries if entry.weight))


def _applied(lease: Lease, entry: MixEntry) -> Applied:
    return Applied(lease.version.name, lease.version.content, entry.weight, lease.alias)


def _check_model(registry: Registry, name: str, adapter: Sequence[MixEntry] | None) -> None:
    """Raises UnknownModel, and InvalidRequest where ``adapter`` says something else."""
    if not registry.knows(name):
        raise UnknownModel(name)
    if adapter is not None and {entry.name for entry in adapter} != {name}:
        raise InvalidRequest(
            f"`model` names the adapter `{name}` and `adapter` names others; name it once.", param="adapter"
        )
