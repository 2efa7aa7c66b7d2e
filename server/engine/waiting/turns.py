"""Turns: flows kept in the order of their ranks. A step moves those that it has charged, and sorts no others."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from heapq import heappop, heappush, heapreplace, merge
from itertools import groupby
from operator import itemgetter
from typing import Generic, TypeVar

from adapters.format.spec import AdapterId
from server.engine.waiting.fairness import PROMPT_TOKEN, Flow, Rank, Tenant

T = TypeVar("T", bound=Hashable)


class Ordered(Generic[T]):
    """Items by ranks, of which no two are equal. To put or to discard one costs the logarithm of their number."""

    def __init__(self) -> None:
        self.ranks: list[Rank] = []
        """Those of the items, the least first."""
        self._items: dict[Rank, T] = {}
        self._rank_of: dict[T, Rank] = {}

    def __len__(self) -> int:
        return len(self.ranks)

    def __contains__(self, item: T) -> bool:
        return item in self._rank_of

    def __iter__(self) -> Iterator[T]:
        """Iterate in order. Nothing may be put or discarded meanwhile."""
        return (self._items[rank] for rank in self.ranks)

    def __getitem__(self, rank: Rank) -> T:
        return self._items[rank]

    def put(self, item: T, rank: Rank) -> None:
        """Add an item, or move it."""
        old = self._rank_of.get(item)
        if old == rank:
            return
        if old is not None:
            del self._items[old]
            del self.ranks[bisect_left(self.ranks, old)]
        insort(self.ranks, rank)
        self._items[rank] = item
        self._rank_of[item] = rank

    def discard(self, item: T) -> None:
        """Remove an item, if it is there."""
        rank = self._rank_of.pop(item, None)
        if rank is not None:
            del self._items[rank]
            del self.ranks[bisect_left(self.ranks, rank)]


class Turns:
    """Some of the waiting flows, by whose turn it is."""

    def __init__(self) -> None:
        self.adapters: Counter[AdapterId] = Counter()
        """How many of the flows use an adapter."""
        self._tenants: Ordered[Tenant] = Ordered()
        self._flows: dict[Tenant, Ordered[Flow]] = {}

    def __bool__(self) -> bool:
        return bool(self._flows)

    def __contains__(self, flow: Flow) -> bool:
        flows = self._flows.get(flow.tenant)
        return flows is not None and flow in flows

    def __iter__(self) -> Iterator[Flow]:
        """Iterate in order. Nothing may be put or discarded meanwhile."""
        return (flow for tenant in self._tenants for flow in self._flows[tenant])

    def put(self, flow: Flow, now: float) -> None:
        """Add a waiting flow, or move it to where it belongs now."""
        flows = self._flows.setdefault(flow.tenant, Ordered())
        self.move(flow.tenant)
        if flow not in flows:
            self.adapters.update(flow.adapters)
        flows.put(flow, flow.place(now))

    def discard(self, flow: Flow) -> None:
        """Remove a flow, if it is there."""
        if flow not in self:
            return
        flows = self._flows[flow.tenant]
        flows.discard(flow)
        if not flows:
            del self._flows[flow.tenant]
            self._tenants.discard(flow.tenant)
        for adapter in flow.adapters:
            self.adapters[adapter] -= 1
            if not self.adapters[adapter]:
                del self.adapters[adapter]

    def move(self, tenant: Tenant) -> None:
        """Move a tenant whose counter has changed."""
        if tenant in self._flows:
            self._tenants.put(tenant, tenant.place)

    def tenants(self) -> Iterator[tuple[Rank, Tenant]]:
        """Iterate over the tenants and their places, in order."""
        return ((rank, self._tenants[rank]) for rank in self._tenants.ranks)

    def flows(self, tenant: Tenant) -> Iterator[tuple[Rank, Flow]]:
        """Iterate over a tenant's flows and their places, in order."""
        flows = self._flows.get(tenant)
        return ((rank, flows[rank]) for rank in flows.ranks) if flows else iter(())


def fair_order(*turns: Turns) -> Iterator[Flow]:
    """Iterate over all flows in the order in which their heads will start if all can, without knowing the answers.

    Takes time for the flows that it has returned, and for no others. Nothing may be put or discarded meanwhile.
    """
    merged = merge(*(each.tenants() for each in turns), key=_rank)
    tenants = (next(equal) for _, equal in groupby(merged, key=_rank))
    following = next(tenants, None)
    heap: list[tuple[float, float, Flow, Iterator[tuple[Rank, Flow]]]] = []
    while heap or following:
        while following and (not heap or following[0] < heap[0][:2]):
            (counter, turn), tenant = following
            own = merge(*(each.flows(tenant) for each in turns), key=_rank)
            heappush(heap, (counter, turn, next(own)[1], own))
            following = next(tenants, None)
        counter, turn, flow, flows = heap[0]
        after = next(flows, None)
        if after:
            prompt = PROMPT_TOKEN * len(flow.head.tokens)
            heapreplace(heap, (counter + prompt / flow.tenant.weight, turn, after[1], flows))
        else:
            heappop(heap)
        yield flow


_rank = itemgetter(0)
