"""SlotTable: which adapter sits where on the device, who leases it, and which one goes next.

Device memory for adapters is a pool of rank columns, handed out in pages of :data:`PAGE` columns. A slot is the set of
pages one adapter occupies: as many as its own rank needs, anywhere in the pool. Pinned adapters never leave.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from adapters.format.spec import AdapterId
from server.engine.sequence import Adaptation

PAGE = 8
"""Rank columns in a page. Small enough that rank 4 wastes little, large enough for matrix units."""


def pages_for(rank: int) -> int:
    """Pages that hold ``rank`` columns."""
    return -(-rank // PAGE)


def _pages(ranks: Iterable[int]) -> int:
    return sum(map(pages_for, ranks))


@dataclass(slots=True)
class Slot:
    """One adapter on the device."""

    pages: tuple[int, ...]
    leases: int = 0
    used: bool = False
    """By more than trials."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter goes, and which adapters left to make room."""

    pages: tuple[int, ...]
    evicted: tuple[AdapterId, ...]


class SlotTable:
    """At most ``slots`` adapters in ``pages`` pages, least recently used first to go. Leased adapters stay."""

    def __init__(self, slots: int, pages: int) -> None:
        self.slots = slots
        self.pages = pages
        self.pinned: Mapping[AdapterId, int] = {}
        """Pinned adapters and their ranks, resident or not; replaced, never changed, so any thread may read it."""
        self.arriving: frozenset[AdapterId] = frozenset()
        """Resident, but still being copied: nobody is made to wait for them while others can run."""
        self._resident: OrderedDict[AdapterId, Slot] = OrderedDict()
        self._free = set(range(pages))

    def __contains__(self, adapter: AdapterId) -> bool:
        return adapter in self._resident

    @property
    def resident(self) -> Collection[AdapterId]:
        """Adapters on the device, least recently used first."""
        return self._resident.keys()

    def pages_of(self, adapter: AdapterId) -> tuple[int, ...]:
        """The pages a resident adapter occupies, in the order of its columns."""
        return self._resident[adapter].pages

    def leases(self, adapter: AdapterId) -> int:
        """Live sequences that use the adapter."""
        slot = self._resident.get(adapter)
        return slot.leases if slot else 0

    def misfit(self, adaptation: Adaptation) -> str | None:
        """Why these adapters can never be on the device together beside the pinned ones, if so. For any thread."""
        wanted = [adapted.rank for adapted in adaptation]
        ids = {adapted.id for adapted in adaptation}
        others = [rank for adapter, rank in self.pinned.items() if adapter not in ids]
        if len(wanted) + len(others) <= self.slots and _pages(wanted) + _pages(others) <= self.pages:
            return None
        taken = f", of which pinned adapters take {len(others)} and {_pages(others)}" if others else ""
        return (
            f"These {len(wanted)} adapters ({_pages(wanted)} pages of rank columns) do not fit the device together: "
            f"it holds {self.slots} adapters and {self.pages} pages{taken}."
        )

    def lease(self, adapters: Iterable[AdapterId], *, trial: bool = False) -> None:
        """Hold resident adapters on the device. A trial is no use: it leaves them where they were in the order."""
        for adapter in adapters:
            slot = self._resident[adapter]
            slot.leases += 1
            if not trial:
                slot.used = True
                self._resident.move_to_end(adapter)

    def release(self, adapters: Iterable[AdapterId]) -> None:
        """Give leases back."""
        for adapter in adapters:
            self._resident[adapter].leases -= 1

    def demote(self, adapters: Iterable[AdapterId]) -> None:
        """Make idle adapters that had nothing but trials the first to go; others stay where they are in the order."""
        for adapter in adapters:
            slot = self._resident[adapter]
            if not (slot.leases or slot.used or adapter in self.pinned):
                self._resident.move_to_end(adapter, last=False)

    def place(self, adapter: AdapterId, rank: int, keep: Collection[AdapterId] = ()) -> Placement | None:
        """Make room for an adapter that is not resident, or return None and change nothing.

        ``keep`` names idle adapters that must not be evicted for this one.
        """
        need = pages_for(rank)
        evicted = self._room(need, (a for a in self._movable(keep) if not self._resident[a].leases))
        if evicted is None:
            return None
        for other in evicted:
            self.evict(other)
        pages = self._pick(need)
        self._free.difference_update(pages)
        self._resident[adapter] = Slot(pages)
        return Placement(pages, evicted)

    def evict(self, adapter: AdapterId) -> tuple[int, ...]:
        """Take an adapter without leases off the device; returns the pages it had."""
        slot = self._resident.pop(adapter)
        assert not slot.leases, f"adapter {adapter} is leased"
        self._free.update(slot.pages)
        return slot.pages

    def draining(self, ranks: Collection[int], keep: Collection[AdapterId]) -> set[AdapterId]:
        """Adapters to lease no more, so that adapters of ``ranks`` find room once their last lease ends."""
        order = sorted(self._movable(keep), key=self.leases)
        return set(self._room(_pages(ranks), iter(order), slots=len(ranks)) or ())

    def _movable(self, keep: Collection[AdapterId]) -> Iterable[AdapterId]:
        return (adapter for adapter in self._resident if adapter not in keep and adapter not in self.pinned)

    def _room(self, need: int, candidates: Iterable[AdapterId], slots: int = 1) -> tuple[AdapterId, ...] | None:
        """The first of ``candidates`` that must go for ``need`` pages and ``slots`` slots; None if all are too few."""
        gone: list[AdapterId] = []
        pages, room = len(self._free), self.slots - len(self._resident)
        supply = iter(candidates)
        while pages < need or room < slots:
            adapter = next(supply, None)
            if adapter is None:
                return None
            gone.append(adapter)
            pages += len(self._resident[adapter].pages)
            room += 1
        return tuple(gone)

    def _pick(self, need: int) -> tuple[int, ...]:
        """Free pages: the lowest consecutive run if there is one (one matrix product instead of several)."""
        free = sorted(self._free)
        for i in range(len(free) - need + 1):
            if free[i + need - 1] - free[i] == need - 1:
                return tuple(free[i : i + need])
        return tuple(free[:need])

    def check(self, users: Counter[AdapterId]) -> None:
        """Assert that ``users``, live sequences by adapter, explain every lease, and that every page has one owner."""
        leases = Counter({adapter: slot.leases for adapter, slot in self._resident.items() if slot.leases})
        assert leases == users, f"leases {leases}, users {users}"
        owned = [page for slot in self._resident.values() for page in slot.pages]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert set(owned) | self._free == set(range(self.pages)), "a page is lost"
        assert not set(owned) & self._free, "a page is owned and free"
        assert len(self._resident) <= self.slots
