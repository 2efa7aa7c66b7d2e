"""Resolve the adapter names in a request to adapter versions, and lease those versions."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from adapters.errors import UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.in_memory import Lease
from adapters.registry.names import parse_reference
from adapters.sources.address import local_name
from server.access.key import ApiKey
from server.access.view import RegistryView
from server.api.schemas.generation import AdaptedRequest, MixEntry
from server.api.service import Service
from server.engine.sequence import Adaptation, WeightedAdapter
from server.errors import InvalidRequest, UnknownModel


@dataclass(frozen=True, slots=True)
class LeasedAdapter:
    """One adapter that takes part in an answer, as the request named it."""

    name: str
    """Name with version, as in ``legal@2``."""
    id: AdapterId
    weight: float
    alias: str | None
    """Alias under which the request named the adapter, if it used one."""
    shown: str
    """What the caller may know of the name: the alias, if its key does not see what that means."""

    @property
    def hidden(self) -> bool:
        """Whether the caller may know neither the name nor the content: equal contents would tell whose they are."""
        return self.shown != self.name

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the response's ``adapter`` list."""
        id_ = {} if self.hidden else {"id": self.id}
        alias = {} if self.alias is None else {"alias": self.alias}
        return {"name": self.shown, **id_, "weight": self.weight, **alias}


@dataclass(frozen=True, slots=True)
class LeasedAdapters:
    """The adapter versions that a request uses. They stay available until ``release`` is called."""

    registry: RegistryView
    leases: tuple[Lease, ...]
    applied: tuple[LeasedAdapter, ...]
    """In the order of the request, without those of weight 0."""
    model: str = ""
    """The request's ``model``, or the base's name."""

    @property
    def adaptation(self) -> Adaptation:
        """The adapters as the engine takes them: the weights of names with the same content are added up."""
        weights: defaultdict[AdapterId, float] = defaultdict(float)
        for applied in self.applied:
            weights[applied.id] += applied.weight
        ranks = {lease.version.content: lease.version.rank for lease in self.leases}
        return tuple(WeightedAdapter(id_, weight, ranks[id_]) for id_, weight in weights.items() if weight)

    @property
    def label(self) -> str:
        """The versions for counts of use: joined by ``+`` for a mix, and empty for the base alone.

        The counts are shown to the key, so its alias stands for a version that it does not see.
        """
        return "+".join(sorted({applied.shown for applied in self.applied}))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, without versions, each once."""
        return tuple(dict.fromkeys(parse_reference(applied.name).name for applied in self.applied))

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
        value = ";".join(each.shown if each.hidden else f"{each.shown}={each.id}" for each in self.applied)
        return {"x-manylora-adapter": value} if value else {}

    def release(self) -> None:
        """Give the leases back. Call exactly once."""
        self.registry.release(self.leases)


def lease_adapters(service: Service, key: ApiKey, request: AdaptedRequest) -> LeasedAdapters:
    """Lease all adapters that ``model`` and ``adapter`` of a request name, or none if one of them fails.

    A name refers to an adapter, a version or an alias, or is the address of an adapter that
    :func:`server.api.registry.on_request.fetch_named` has registered; the result is empty for the base. ``model`` may
    be the base's name or, as in vLLM, the name of an adapter. An empty ``adapter`` list asks for the base. Raises
    UnknownModel, UnknownAdapter or AdapterUnavailable, and InvalidRequest if the two fields contradict each other. What
    ``key`` does not see is unknown.
    """
    registry, base = service.view(key), service.base.name
    entries = _requested(registry, base, request)
    names = list(dict.fromkeys(local_name(entry.name) for entry in entries))  # an alias is resolved once per request
    try:
        leases = registry.acquire(names, request.user or None)
    except UnknownAdapter as error:
        if request.model is not None and error.name == local_name(request.model) != base:
            raise UnknownModel(request.model) from error
        raise
    by_name = dict(zip(names, leases, strict=True))
    applied = [_applied(registry, by_name[local_name(entry.name)], entry) for entry in entries if entry.weight]
    return LeasedAdapters(registry, leases, tuple(applied), request.model or service.base.name)


def _requested(registry: RegistryView, base: str, request: AdaptedRequest) -> list[MixEntry]:
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


def _applied(registry: RegistryView, lease: Lease, entry: MixEntry) -> LeasedAdapter:
    version = lease.version
    shown = version.name if lease.alias is None or registry.sees(version.adapter) else lease.alias
    return LeasedAdapter(version.name, version.content, entry.weight, lease.alias, shown)
