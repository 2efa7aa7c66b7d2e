"""BlockPool against a simple model of it, in random steps."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.format.spec import AdapterId
from server.engine.block_pool import BlockPool, block_key, chain_keys, root_key
from server.engine.sequence import SamplingParams, Sequence, WeightedAdapter

TOTAL, SIZE = 6, 2


class Blocks(RuleBasedStateMachine):
    """Block tables that are allocated, shared and released, and the key of each cached block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL, SIZE)
        self.tables: list[list[int]] = []
        self.holds: dict[int, bytes] = {}
        self.cached: set[bytes] = set()

    @rule(count=st.integers(0, TOTAL))
    def allocate(self, count: int) -> None:
        if count <= self.pool.free:
            taken = self.pool.allocate(count)
            assert len(set(taken)) == count
            assert not any(block in table for block in taken for table in self.tables)
            assert set(taken) <= set(self.pool.take_new())
            for block in taken:
                self.holds.pop(block, None)
            self.tables.append(taken)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), key=st.integers(0, 5))
    def cache(self, data: st.DataObject, key: int) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        name = bytes([key])
        before = self.pool.match([name])
        self.pool.cache(block, name)
        if before:
            assert self.pool.match([name]) == before, "the first block under a key stays"
        elif block not in self.holds:
            assert self.pool.match([name]) == [block]
            self.holds[block] = name

    @rule(keys=st.lists(st.integers(0, 5), max_size=3, unique=True))
    def share(self, keys: list[int]) -> None:
        found = self.pool.match(bytes([key]) for key in keys)
        assert [self.holds[block] for block in found] == [bytes([key]) for key in keys[: len(found)]]
        before = self.pool.free
        idle = self.pool.count_idle(found)
        self.pool.share(found)
        assert self.pool.free == before - idle
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables = [other for other in self.tables if other is not table]
        self.pool.release(table)

    @invariant()
    def integrity(self) -> None:
        self.pool.check(self.tables)


TestBlocks = Blocks.TestCase


def test_least_recently_used_blocks_are_allocated_first() -> None:
    pool = BlockPool(3, SIZE)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.cache(block, key)
    for block in blocks:
        pool.release([block])
    pool.share(pool.match([b"a"]))  # a is used once more, so b is now the oldest
    pool.release([blocks[0]])
    assert pool.allocate(1) == [blocks[1]]
    assert pool.match([b"a"])
    assert not pool.match([b"b"])


def test_the_end_of_a_prefix_is_allocated_before_its_beginning() -> None:
    pool = BlockPool(2, SIZE)
    first, second = pool.allocate(2)
    pool.cache(first, b"beginning")
    pool.cache(second, b"end")
    pool.release([first, second])
    assert pool.allocate(1) == [second]


def test_keys_depend_on_adapter_content_weight_parent_and_tokens() -> None:
    plain, other = AdapterId("a" * 64), AdapterId("b" * 64)
    roots = [
        root_key(()),
        root_key((WeightedAdapter(plain, 1.0, 8),)),
        root_key((WeightedAdapter(plain, 0.5, 8),)),
        root_key((WeightedAdapter(other, 1.0, 8),)),
        root_key((WeightedAdapter(plain, 0.5, 8), WeightedAdapter(other, 0.5, 8))),
    ]
    assert len(set(roots)) == len(roots)
    assert len({block_key(root, [1, 2]) for root in roots}) == len(roots)
    assert block_key(roots[0], [1, 2]) != block_key(roots[0], [2, 1])
    mix = (WeightedAdapter(other, 2.0, 8), WeightedAdapter(plain, 1.0, 8))
    turned = (WeightedAdapter(plain, 1.0, 8), WeightedAdapter(other, 2.0, 8))
    params = SamplingParams()
    assert Sequence("a", [1], params, mix).adaptation == Sequence("b", [1], params, turned).adaptation


def test_keys_grow_with_the_tokens() -> None:
    one = Sequence("one", [1, 2, 3], SamplingParams())
    chain_keys(one, SIZE)
    assert len(one.keys) == 1
    one.tokens += [4, 5, 6]
    chain_keys(one, SIZE)
    again = Sequence("again", [1, 2, 3], SamplingParams())
    again.tokens += [4, 5, 6]
    chain_keys(again, SIZE)
    assert one.keys == again.keys
    assert len(one.keys) == 3
