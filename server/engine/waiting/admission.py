"""Admission: which waiting sequences may start, by their adapters, and which adapters are loaded for the others.

A sequence whose adapters are all on the device may start before one that is ahead of it and still waits for its own. So
the requests of an adapter run together, and an adapter more than there are slots costs its own load only. An adapter
is not evicted while a sequence that could start with it waits.

After ``max_wait`` seconds, a sequence is late. Then the adapters with the fewest leases take no new sequences that are
behind it in the fair order, until its own fit; but an adapter that sequences wait for stays for ``max_wait`` seconds
once it is there. So with k slots there are at most k loads in ``max_wait`` seconds beyond those that replace adapters
that nobody waits for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import NamedTuple

from adapters.format.spec import AdapterId
from server.engine.sequence import Adaptation, Sequence, WeightedAdapter
from server.engine.slots import SlotTable
from server.engine.waiting.fairness import FairQueue, Flow, Rank
from server.engine.waiting.turns import Ordered, Turns, fair_order


class WantedAdapter(NamedTuple):
    """An adapter to load."""

    adapter: WeightedAdapter
    keep: set[AdapterId]
    """Adapters that must not be evicted for it."""
    sequence: Sequence | None
    """The first one that waits for it; None if it is pinned."""
    late: bool
    """Whether that one has waited for longer than ``max_wait``."""


@dataclass
class Openings:
    """Which adapters may not be used in a step."""

    copying: frozenset[AdapterId]
    closed: set[AdapterId]
    until: Rank
    """Only sequences of this rank or a lower one may use closed adapters."""

    def admits(self, flow: Flow, now: float) -> bool:
        """Whether a flow may start a sequence."""
        if not self.copying.isdisjoint(flow.adapters):
            return False
        return self.closed.isdisjoint(flow.adapters) or flow.rank(now) <= self.until


class Admission:
    """Decides by the adapters on the device, for the sequences that wait."""

    def __init__(self, waiting: FairQueue, slots: SlotTable, max_wait: float) -> None:
        self._waiting = waiting
        self._slots = slots
        self._max_wait = max_wait
        self.pins_to_load: dict[AdapterId, WeightedAdapter] = {}
        """Pinned adapters, which are loaded without a request; those that could not be loaded are taken out."""
        self._pinned_at = 0.0
        self._ready = Turns()
        """The flows whose adapters are on the device."""
        self._missing = Turns()
        """All others."""
        self._late = Turns()
        """Those of ``_missing`` whose heads have waited for longer than ``max_wait``."""
        self._timers: Ordered[Flow] = Ordered()
        """When time alone changes the place of a flow."""
        self._changes = 0
        """``slots.changes`` when the flows were last looked at."""

    def pin(self, adapters: Iterable[WeightedAdapter], now: float) -> None:
        """Pin these adapters and unpin all others."""
        self.pins_to_load = {adapter.id: adapter for adapter in adapters}
        self._slots.pinned = {adapter.id: adapter.rank for adapter in self.pins_to_load.values()}
        self._pinned_at = now

    def openings(self, now: float, copying: frozenset[AdapterId]) -> Openings:
        """Return who may start. Sequences that need an adapter of ``copying`` wait for that."""
        self._look(now)
        self._take_turns(now)
        if closed := self._closed_for_pins(now):
            return Openings(copying, closed, ())
        for probe in self._waiting.probes:
            if self._is_late(probe, now) and (lacking := self._lacking(probe.adaptation)):
                return Openings(copying, self._closed_for(probe.adaptation, lacking, now), ())
        first = next(iter(self._late), None)
        if first is None:
            return Openings(copying, set(), ())
        closed = self._closed_for(first.adaptation, self._lacking(first.adaptation), now)
        return Openings(copying, closed, first.rank(now))

    def first(self, openings: Openings, now: float) -> Flow | None:
        """Return the flow that may start a sequence and whose turn it is."""
        self._look(now)
        self._take_turns(now)
        return next((flow for flow in self._ready if openings.admits(flow, now)), None)

    def missing_adapters(self, now: float) -> Iterator[WantedAdapter]:
        """Adapters to load: pinned ones, then those of waiting sequences, in the fair order.

        No adapter of a sequence is evicted for one behind it in the queue: the adapters of a mix are loaded one by one,
        and two mixes could otherwise evict each other's for ever.
        """
        keep: set[AdapterId] = set()
        for adapter in self._missing_pins():
            yield WantedAdapter(adapter, keep, None, late=False)
        self._look(now)
        if not self._missing and not self._waiting.probes:
            return
        self._take_turns(now)
        wanted = set(self._ready.adapters)
        fresh = self._fresh(wanted, now)
        probes = ((probe, probe.adaptation) for probe in self._waiting.probes)
        flows = ((flow.head, flow.adaptation) for flow in fair_order(self._ready, self._missing))
        for head, adaptation in chain(probes, flows):
            keep.update(adapter.id for adapter in adaptation)
            late = self._is_late(head, now)
            for adapter in self._lacking(adaptation):
                yield WantedAdapter(adapter, keep | (fresh if late else wanted), head, late)

    def _look(self, now: float) -> None:
        """Take in which flows began to wait or do not any more, which adapters came or went, and what time changes."""
        changed = self._waiting.take_changed()
        if self._changes != self._slots.changes:
            self._changes = self._slots.changes
            for adapter in self._slots.resident ^ self._ready.adapters.keys():
                changed.update(self._waiting.users.get(adapter, ()))
        changed.update(self._timers[rank] for rank in takewhile(lambda rank: rank[0] <= now, self._timers.ranks))
        for flow in changed:
            self._put(flow, now)

    def _put(self, flow: Flow, now: float) -> None:
        """Put a flow where it belongs, if it still waits."""
        missing = bool(flow.waiting) and not flow.adapters <= self._slots.resident
        late = missing and self._is_late(flow.head, now)
        ready = bool(flow.waiting) and not missing
        for turns, belongs in ((self._ready, ready), (self._missing, missing), (self._late, late)):
            if belongs:
                turns.put(flow, now)
            else:
                turns.discard(flow)
        timers = [flow.ripe_at] if flow.waiting and flow.ripe_at > now else []
        if missing and not late:
            timers.append(flow.head.arrived + self._max_wait)
        self._timers.discard(flow)
        if timers:
            self._timers.put(flow, (min(timers), flow.turn))

    def _take_turns(self, now: float) -> None:
        """Take in what tenants and flows were charged for."""
        tenants, flows = self._waiting.take_charged()
        for turns in (self._ready, self._missing, self._late):
            for tenant in tenants:
                turns.move(tenant)
            for flow in flows:
                if flow in turns:
                    turns.put(flow, now)

    def _closed_for(self, adaptation: Adaptation, missing: list[WeightedAdapter], now: float) -> set[AdapterId]:
        """Adapters that take no sequences queued behind a late one, until that one fits.

        Sequences ahead of it still run: their adapters are not evicted for it, so they must finish first.
        """
        wanted = set(self._ready.adapters)
        keep = {adapter.id for adapter in adaptation} | self._fresh(wanted, now)
        return self._slots.next_to_evict([adapter.rank for adapter in missing], keep, wanted)

    def _closed_for_pins(self, now: float) -> set[AdapterId]:
        """Adapters that take no new sequences, because a pinned one has not fitted for too long."""
        missing = self._missing_pins()
        if not missing or now - self._pinned_at <= self._max_wait:
            return set()
        return self._slots.next_to_evict([missing[0].rank], ())

    def _fresh(self, adapters: set[AdapterId], now: float) -> set[AdapterId]:
        """Those that have not been on the device for ``max_wait`` seconds yet."""
        return {adapter for adapter in adapters if now - self._slots.placed_at(adapter) <= self._max_wait}

    def _is_late(self, sequence: Sequence, now: float) -> bool:
        return now - sequence.arrived > self._max_wait

    def _lacking(self, adaptation: Adaptation) -> list[WeightedAdapter]:
        return [adapter for adapter in adaptation if adapter.id not in self._slots]

    def _missing_pins(self) -> list[WeightedAdapter]:
        return [adapter for adapter in self.pins_to_load.values() if adapter.id not in self._slots]
