"""Resolve the adapter names in a request to adapter versions, and lease those versions."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from adapters.errors import UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.in_memory import Lease
from adapters.registry.registry import Registry
from adapters.sources.address import local_name
from server.api.schemas.generation import AdaptedRequest, MixEntry
from server.engine.sequence import Adaptation, WeightedAdapter
from server.errors import InvalidRequest, UnknownModel


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One adapter that takes part in an answer."""

    name: str
    """Name with version, as in ``legal@2``."""
    id: AdapterId
    weight: float
    alias: str | None
    """Alias under which the request named the adapter, if it used one."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the response's ``adapter`` list."""
        entry = {"name": self.name, "id": self.id, "weight": self.weight}
        return entry if self.alias is None else {**entry, "alias": self.alias}


@dataclass(frozen=True, slots=True)
class LeasedAdapters:
    """The adapter versions that a request uses. They stay available until ``release`` is called."""

    registry: Registry
    leases: tuple[Lease, ...]
    applied: tuple[AppliedAdapter, ...]
    """In the order of the request, without those of weight 0."""

    @property
    def adaptation(self) -> Adaptation:
        """The adapters as the engine takes them: the weights of names with the same content are added up."""
        weights: defaultdict[AdapterId, float] = defaultdict(float)
        for applied in self.applied:
            weights[applied.id] += applied.weight
        ranks = {lease.version.content: lease.version.rank for lease in self.leases}
        return tuple(WeightedAdapter(id_, weight, ranks[id_]) for id_, weight in weights.items() if weight)

    @property
    def aliases(self) -> set[tuple[str, str]]:
        """Pairs of an alias that the request used and the version that it was resolved to."""
        return {(applied.alias, applied.name) for applied in self.applied if applied.alias is not None}

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Give the leases back if the block raises."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def to_json(self) -> list[dict[str, Any]]:
        """Return a response's ``adapter`` list."""
        return [applied.to_json() for applied in self.applied]

    def header(self) -> dict[str, str]:
        """Return the response header that names the adapter contents used for the answer, if any."""
        value = ";".join(f"{applied.name}={applied.id}" for applied in self.applied)
        return {"x-manylora-adapter": value} if value else {}

    def release(self) -> None:
        """Give the leases back. Call exactly once."""
        self.registry.release(self.leases)


def lease_adapters(registry: Registry, base: str, request: AdaptedRequest) -> LeasedAdapters:
    """Lease all adapters that ``model`` and ``adapter`` of a request name, or none if one of them fails.

    A name refers to an adapter, a version or an alias, or is the address of an adapter that
    :func:`server.api.registry.on_request.fetch_named` has registered; the result is empty for the base. ``model`` may
    be the base's name or, as in vLLM, the name of an adapter. An empty ``adapter`` list asks for the base. Raises
    UnknownModel, UnknownAdapter or AdapterUnavailable, and InvalidRequest if the two fields contradict each other.
    """
    entries = _requested(registry, base, request)
    names = list(dict.fromkeys(local_name(entry.name) for entry in entries))  # an alias is resolved once per request
    try:
        leases = registry.acquire(names, request.user or None)
    except UnknownAdapter as error:
        if request.model is not None and error.name == local_name(request.model) != base:
            raise UnknownModel(request.model) from error
        raise
    by_name = dict(zip(names, leases, strict=True))
    applied = [_applied(by_name[local_name(entry.name)], entry) for entry in entries if entry.weight]
    return LeasedAdapters(registry, leases, tuple(applied))


def _requested(registry: Registry, base: str, request: AdaptedRequest) -> list[MixEntry]:
    model, adapters = request.model, request.adapter
    if model is None or model == base:
        return adapters or []
    if not registry.knows(local_name(model)):
        raise UnknownModel(model)
    if adapters is not None and {entry.name for entry in adapters} != {model}:
        raise InvalidRequest(
            f"`model` names the adapter `{model}` and `adapter` names others; name it once.", param="adapter"
        )
    return [MixEntry(name=model, weight=1.0)] if adapters is None else adapters


def _applied(lease: Lease, entry: MixEntry) -> AppliedAdapter:
    return AppliedAdapter(lease.version.name, lease.version.content, entry.weight, lease.alias)
