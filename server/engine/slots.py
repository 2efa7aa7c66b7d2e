"""SlotTable: which adapter occupies which pages of the device, how many leases it has, and which is evicted next.

Device memory for adapters is a pool of rank columns, allocated in pages of :data:`PAGE` columns. A slot is the set of
pages of one adapter: as many as its rank needs, anywhere in the pool. Pinned adapters are never evicted.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, KeysView, Mapping
from dataclasses import dataclass

from adapters.format.spec import AdapterId
from server.engine.sequence import Adaptation

PAGE = 8
"""Rank columns in a page: few enough to waste little on rank 4, enough for the matrix units of processors."""


def pages_for(rank: int) -> int:
    """Return the number of pages that ``rank`` columns need."""
    return -(-rank // PAGE)


def _pages(ranks: Iterable[int]) -> int:
    return sum(map(pages_for, ranks))


@dataclass(slots=True)
class Slot:
    """One adapter on the device."""

    pages: tuple[int, ...]
    placed_at: float
    leases: int = 0
    used: bool = False
    """Whether anything but a probe has leased it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The pages of a placed adapter, and the adapters that were evicted for it."""

    pages: tuple[int, ...]
    evicted: tuple[AdapterId, ...]


class SlotTable:
    """At most ``slots`` adapters in ``pages`` pages. Evicts the least recently used first, and never a leased one."""

    def __init__(self, slots: int, pages: int) -> None:
        self.slots = slots
        self.pages = pages
        self.pinned: Mapping[AdapterId, int] = {}
        """Pinned adapters, resident or not, and their ranks. Replaced, never changed, so any thread may read it."""
        self.copying: frozenset[AdapterId] = frozenset()
        """Resident adapters that are still being copied. New sequences that use them wait while others run."""
        self.changes = 0
        """How often an adapter has come or gone."""
        self._resident: OrderedDict[AdapterId, Slot] = OrderedDict()
        self._free = set(range(pages))

    def __contains__(self, adapter: AdapterId) -> bool:
        return adapter in self._resident

    @property
    def resident(self) -> KeysView[AdapterId]:
        """Adapters on the device, least recently used first."""
        return self._resident.keys()

    def pages_of(self, adapter: AdapterId) -> tuple[int, ...]:
        """Return the pages of a resident adapter, in the order of its columns."""
        return self._resident[adapter].pages

    def placed_at(self, adapter: AdapterId) -> float:
        """Return the ``now`` at which a resident adapter was placed."""
        return self._resident[adapter].placed_at

    def leases(self, adapter: AdapterId) -> int:
        """Return the number of leases on an adapter; 0 if it is not resident."""
        slot = self._resident.get(adapter)
        return slot.leases if slot else 0

    def fit_error(self, adaptation: Adaptation) -> str | None:
        """Return why these adapters cannot be on the device together with the pinned ones, or None. For any thread."""
        wanted = [adapter.rank for adapter in adaptation]
        ids = {adapter.id for adapter in adaptation}
        others = [rank for adapter, rank in self.pinned.items() if adapter not in ids]
        if len(wanted) + len(others) <= self.slots and _pages(wanted) + _pages(others) <= self.pages:
            return None
        taken = f", of which pinned adapters take {len(others)} and {_pages(others)}" if others else ""
        return (
            f"These {len(wanted)} adapters ({_pages(wanted)} pages of rank columns) do not fit the device together: "
            f"it holds {self.slots} adapters and {self.pages} pages{taken}."
        )

    def lease(self, adapters: Iterable[AdapterId], *, probe: bool = False) -> None:
        """Keep resident adapters on the device. A probe's lease does not make them recently used."""
        for adapter in adapters:
            slot = self._resident[adapter]
            slot.leases += 1
            if not probe:
                slot.used = True
                self._resident.move_to_end(adapter)

    def release(self, adapters: Iterable[AdapterId]) -> None:
        """Give leases back."""
        for adapter in adapters:
            self._resident[adapter].leases -= 1

    def demote(self, adapters: Iterable[AdapterId]) -> None:
        """Make adapters that nothing but probes has leased the first to be evicted. Leaves all others as they are."""
        for adapter in adapters:
            slot = self._resident[adapter]
            if not (slot.leases or slot.used or adapter in self.pinned):
                self._resident.move_to_end(adapter, last=False)

    def place(
        self, adapter: AdapterId, rank: int, keep: Collection[AdapterId] = (), now: float = 0.0
    ) -> Placement | None:
        """Allocate pages for an adapter that is not resident. If that is not possible, return None and change nothing.

        Idle adapters are evicted as needed, except those in ``keep``. ``now`` is ``time.monotonic()``.
        """
        needed = pages_for(rank)
        evicted = self._to_evict(needed, (a for a in self._evictable(keep) if not self._resident[a].leases))
        if evicted is None:
            return None
        for other in evicted:
            self.evict(other)
        pages = self._pick_pages(needed)
        self._free.difference_update(pages)
        self._resident[adapter] = Slot(pages, now)
        self.changes += 1
        return Placement(pages, evicted)

    def evict(self, adapter: AdapterId) -> tuple[int, ...]:
        """Remove an adapter without leases. Returns the pages it had."""
        slot = self._resident.pop(adapter)
        assert not slot.leases, f"adapter {adapter} is leased"
        self._free.update(slot.pages)
        self.changes += 1
        return slot.pages

    def next_to_evict(
        self, ranks: Collection[int], keep: Collection[AdapterId], wanted: Collection[AdapterId] = ()
    ) -> set[AdapterId]:
        """Return adapters to evict for new ones of ``ranks``, those with the fewest leases. Give them no new leases.

        Of those with equally many, the ones come last that are ``wanted`` by waiting sequences.
        """
        order = sorted(self._evictable(keep), key=lambda adapter: (self.leases(adapter), adapter in wanted))
        return set(self._to_evict(_pages(ranks), iter(order), slots=len(ranks)) or ())

    def _evictable(self, keep: Collection[AdapterId]) -> Iterable[AdapterId]:
        return (adapter for adapter in self._resident if adapter not in keep and adapter not in self.pinned)

    def _to_evict(self, needed: int, candidates: Iterable[AdapterId], slots: int = 1) -> tuple[AdapterId, ...] | None:
        """Return the first ``candidates`` that free ``needed`` pages and ``slots`` slots; None if there are too few."""
        chosen: list[AdapterId] = []
        pages, free_slots = len(self._free), self.slots - len(self._resident)
        remaining = iter(candidates)
        while pages < needed or free_slots < slots:
            adapter = next(remaining, None)
            if adapter is None:
                return None
            chosen.append(adapter)
            pages += len(self._resident[adapter].pages)
            free_slots += 1
        return tuple(chosen)

    def _pick_pages(self, needed: int) -> tuple[int, ...]:
        """Choose free pages: consecutive ones if possible, which need one matrix product instead of several."""
        free = sorted(self._free)
        for i in range(len(free) - needed + 1):
            if free[i + needed - 1] - free[i] == needed - 1:
                return tuple(free[i : i + needed])
        return tuple(free[:needed])

    def check(self, users: Counter[AdapterId]) -> None:
        """Assert that leases match ``users``, running sequences by adapter, and that each page has one owner."""
        leases = Counter({adapter: slot.leases for adapter, slot in self._resident.items() if slot.leases})
        assert leases == users, f"leases {leases}, users {users}"
        owned = [page for slot in self._resident.values() for page in slot.pages]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert set(owned) | self._free == set(range(self.pages)), "a page is lost"
        assert not set(owned) & self._free, "a page is owned and free"
        assert len(self._resident) <= self.slots
