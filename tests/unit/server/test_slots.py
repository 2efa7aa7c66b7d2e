"""SlotTable against a simple model of it, in random steps."""

from collections import Counter
from collections.abc import Iterable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.format.spec import AdapterId
from server.engine.sequence import Adaptation, WeightedAdapter
from server.engine.slots import PAGE, SlotTable, pages_for

SLOTS, PAGES = 3, 8
ADAPTERS = {AdapterId(name): rank for name, rank in zip("abcdef", (1, 8, 9, 16, 40, 64), strict=True)}


def adaptation(names: Iterable[str]) -> Adaptation:
    return tuple(WeightedAdapter(AdapterId(name), 1.0, ADAPTERS[AdapterId(name)]) for name in names)


class Slots(RuleBasedStateMachine):
    """Adapters that are placed, leased, released and evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(SLOTS, PAGES)
        self.users: Counter[AdapterId] = Counter()
        self.used: list[AdapterId] = []
        """Residents, least recently used first."""
        self.probed: set[AdapterId] = set()
        """Residents that nothing but probes has leased."""
        self.pinned: set[AdapterId] = set()

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)), keep=st.sets(st.sampled_from(sorted(ADAPTERS))))
    def place(self, adapter: AdapterId, keep: set[AdapterId]) -> None:
        if adapter in self.table:
            return
        rank = ADAPTERS[adapter]
        evictable = [a for a in self.used if not self.users[a] and a not in keep | self.pinned]
        stay = [a for a in self.used if a not in evictable]
        possible = len(stay) < SLOTS and sum(pages_for(ADAPTERS[a]) for a in stay) + pages_for(rank) <= PAGES
        placement = self.table.place(adapter, rank, keep)
        assert (placement is not None) == possible
        if placement is None:
            return
        assert len(placement.pages) == pages_for(rank)
        assert list(placement.evicted) == evictable[: len(placement.evicted)], "not the least recently used"
        self.used = [a for a in self.used if a not in placement.evicted] + [adapter]
        self.probed = self.probed.difference(placement.evicted) | {adapter}

    @precondition(lambda self: self.used)
    @rule(data=st.data(), probe=st.booleans())
    def lease(self, data: st.DataObject, probe: bool) -> None:
        adapters = data.draw(st.lists(st.sampled_from(self.used), unique=True, min_size=1))
        self.table.lease(adapters, probe=probe)
        self.users.update(adapters)
        if not probe:
            self.used = [a for a in self.used if a not in adapters] + adapters
            self.probed.difference_update(adapters)

    @precondition(lambda self: +self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(sorted(+self.users)))
        self.table.release([adapter])
        self.users[adapter] -= 1

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def demote(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.used))
        self.table.demote([adapter])
        if adapter in self.probed - self.pinned and not self.users[adapter]:
            self.used = [adapter] + [a for a in self.used if a != adapter]

    @rule(pinned=st.sets(st.sampled_from(sorted(ADAPTERS))))
    def pin(self, pinned: set[AdapterId]) -> None:
        if not self.table.fit_error(adaptation(pinned)):
            self.table.pinned = {adapter: ADAPTERS[adapter] for adapter in pinned}
            self.pinned = pinned

    @rule(ranks=st.lists(st.sampled_from([1, 16, 40]), min_size=1, max_size=3))
    def next_to_evict(self, ranks: list[int]) -> None:
        before = list(self.table.resident)
        leaving = self.table.next_to_evict(ranks, keep=set())
        assert list(self.table.resident) == before, "next_to_evict() changed the table"
        assert not leaving & self.pinned
        if not self.table.fit_error(
            tuple(WeightedAdapter(AdapterId(f"new{i}"), 1.0, rank) for i, rank in enumerate(ranks))
        ):
            left = [a for a in self.used if a not in leaving]
            assert len(left) + len(ranks) <= SLOTS
            assert sum(pages_for(ADAPTERS[a]) for a in left) + sum(map(pages_for, ranks)) <= PAGES

    @invariant()
    def integrity(self) -> None:
        self.table.check(+self.users)
        assert list(self.table.resident) == self.used


TestSlots = Slots.TestCase


def test_an_adapter_takes_pages_for_its_own_rank() -> None:
    assert [pages_for(rank) for rank in (1, PAGE, PAGE + 1, 256)] == [1, 1, 2, 256 // PAGE]


def test_pages_are_consecutive_where_they_can_be() -> None:
    table = SlotTable(8, 8)
    placed = [table.place(AdapterId(name), PAGE) for name in "abcdef"]
    table.evict(AdapterId("b"))
    table.evict(AdapterId("d"))
    assert all(placed)
    wide = table.place(AdapterId("g"), 2 * PAGE)
    assert wide
    assert wide.pages == (6, 7)
    scattered = table.place(AdapterId("h"), 2 * PAGE)
    assert scattered
    assert scattered.pages == (1, 3)


def test_pinned_adapters_reduce_what_fits() -> None:
    table = SlotTable(2, 8)
    small, wide = adaptation("bc"), adaptation("e")
    assert not table.fit_error(small)
    table.pinned = {AdapterId("d"): 32}
    assert not table.fit_error(adaptation("cd")), "the pinned one is among them"
    assert "2 adapters and 8 pages, of which pinned adapters take 1 and 4" in str(table.fit_error(small)), (
        "too few slots"
    )
    assert table.fit_error(wide), "too few pages"
    table.pinned = {}
    assert not table.fit_error(small)
    assert "pinned" not in str(table.fit_error(adaptation("abc")))
