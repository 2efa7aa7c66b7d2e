"""BlockPool: allocates KV blocks by reference count, and finds cached ones by their content.

Keys and values are kept in blocks of ``size`` tokens. A full block is cached under a key: a hash over all that its
content depends on, which are the sequence's adapters and their weights, the parent block, and its own tokens. The
tenant is part of it, too, unless tenants share prefixes: how long an answer takes would tell one what others have sent.
Unused blocks keep their content until they are allocated again. This is the prefix cache.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from hashlib import sha256

from server.engine.sequence import Adaptation, Sequence


def root_key(adaptation: Adaptation, tenant: str = "") -> bytes:
    """The parent key of a sequence's first block: 32 bytes that depend on its adapters' contents and weights."""
    parts = [(adapter.id, adapter.weight.hex()) for adapter in adaptation]
    return sha256(repr((tenant, parts)).encode()).digest()


def block_key(parent: bytes, tokens: Seq[int]) -> bytes:
    """Key of a full block: SHA-256 of its parent's key and its own tokens."""
    return sha256(parent + array("q", tokens).tobytes()).digest()


def chain_keys(sequence: Sequence, size: int, *, shared: bool = False) -> None:
    """Extend ``sequence.keys`` to all full blocks of its tokens. ``shared``: the keys are the same for all tenants."""
    keys, tokens = sequence.keys, sequence.tokens
    for start in range(len(keys) * size, len(tokens) - size + 1, size):
        parent = keys[-1] if keys else root_key(sequence.adaptation, "" if shared else sequence.tenant)
        keys.append(block_key(parent, tokens[start : start + size]))


class BlockPool:
    """``total`` blocks of ``size`` tokens, with reference counts.

    A block is either used (by one or more sequences) or idle. Idle blocks are allocated least recently used first, and
    those that are not cached before those that are.
    """

    def __init__(self, total: int, size: int, *, share_prefixes: bool = False) -> None:
        """``share_prefixes``: whether a tenant finds blocks that others have cached."""
        self.total = total
        self.size = size
        self._share_prefixes = share_prefixes
        self._ref_counts = [0] * total
        self._key: list[bytes | None] = [None] * total
        self._cached: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))
        self._new: list[int] = []

    @property
    def free(self) -> int:
        """Number of blocks that can be allocated now: all idle ones, cached or not."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Number of blocks that sequences use."""
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Number of blocks that :meth:`match` can find, used or idle."""
        return len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that ``tokens`` tokens need."""
        return -(-tokens // self.size)

    def chain_keys(self, sequence: Sequence) -> None:
        """Extend ``sequence.keys`` to all full blocks of its tokens."""
        chain_keys(sequence, self.size, shared=self._share_prefixes)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest prefix of ``keys``. Changes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` are idle: sharing them takes that many from ``free``."""
        return sum(1 for block in blocks if self._ref_counts[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Use blocks that :meth:`match` has found, and keep their content."""
        for block in blocks:
            self._idle.pop(block, None)
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks and drop their content from the cache. The caller checks ``free`` first."""
        taken = [self._idle.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._ref_counts[block] = 1
            self._uncache(block)
        self._new += taken
        return taken

    def take_new(self) -> tuple[int, ...]:
        """Return the blocks allocated since the last call. They still hold keys and values of other sequences."""
        new, self._new = tuple(self._new), []
        return new

    def release(self, blocks: Seq[int]) -> None:
        """Give blocks back. The end of a prefix is reused before its beginning, which more sequences share."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._idle[block] = None
                self._idle.move_to_end(block, last=self._key[block] is not None)

    def cache(self, block: int, key: bytes) -> None:
        """Cache a full, computed block. If another block has this key already, that one stays cached."""
        if self._key[block] is None and key not in self._cached:
            self._key[block] = key
            self._cached[key] = block

    def _uncache(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._cached[key]
            self._key[block] = None

    def check(self, tables: Iterable[Seq[int]]) -> None:
        """Assert that the reference counts match ``tables``, the block lists of all unfinished sequences."""
        users = Counter(block for table in tables for block in table)
        for block in range(self.total):
            assert self._ref_counts[block] == users[block], (
                f"block {block}: counted {self._ref_counts[block]}, used by {users[block]}"
            )
            assert (block in self._idle) == (users[block] == 0), f"block {block} is both idle and used, or neither"
        assert self.used + self.free == self.total
        assert {key: block for block, key in enumerate(self._key) if key is not None} == self._cached
