"""BlockPool: who owns which KV block, and which blocks can be found again by what they hold.

Keys and values live in blocks of ``size`` tokens. A full block is published under a key that chains over everything
its content depends on: the adaptation (adapter contents and weights), the parent block, its own tokens. Blocks nobody
uses keep their content until they are needed: that is the prefix cache.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from hashlib import sha256

from server.engine.sequence import Adaptation, Sequence


def root_key(adaptation: Adaptation) -> bytes:
    """Where the key chain of a sequence starts: 32 bytes that differ for different adapter contents or weights."""
    parts = [(adapted.id, adapted.weight.hex()) for adapted in adaptation]
    return sha256(repr(parts).encode()).digest()


def block_key(parent: bytes, tokens: Seq[int]) -> bytes:
    """Key of a full block: 32 bytes over its parent's key and its own tokens."""
    return sha256(parent + array("q", tokens).tobytes()).digest()


def chain_keys(sequence: Sequence, size: int) -> None:
    """Extend ``sequence.keys`` so that every full block of its tokens has one."""
    keys, tokens = sequence.keys, sequence.tokens
    for start in range(len(keys) * size, len(tokens) - size + 1, size):
        parent = keys[-1] if keys else root_key(sequence.adaptation)
        keys.append(block_key(parent, tokens[start : start + size]))


class BlockPool:
    """``total`` blocks of ``size`` tokens, counted by reference.

    A block is either used (one or more sequences hold it) or idle. Idle blocks are handed out least recently used
    first; those that hold nothing findable go before those that do.
    """

    def __init__(self, total: int, size: int) -> None:
        self.total = total
        self.size = size
        self._users = [0] * total
        self._key: list[bytes | None] = [None] * total
        self._found: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))
        self._fresh: list[int] = []

    @property
    def free(self) -> int:
        """Blocks that can be allocated now, cached content included."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks some sequence holds."""
        return self.total - self.free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.size)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The longest run of blocks published under the first of ``keys``. Takes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` nobody uses: sharing them takes that many from ``free``."""
        return sum(1 for block in blocks if self._users[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Use blocks that :meth:`match` found."""
        for block in blocks:
            self._idle.pop(block, None)
            self._users[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks and forget what they held. The caller checks ``free`` first."""
        taken = [self._idle.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._users[block] = 1
            self._forget(block)
        self._fresh += taken
        return taken

    def take_fresh(self) -> tuple[int, ...]:
        """Blocks allocated since the last call: what they held belongs to somebody else."""
        fresh, self._fresh = tuple(self._fresh), []
        return fresh

    def release(self, blocks: Seq[int]) -> None:
        """Give blocks back. The end of a prefix goes first when room is needed: its beginning is shared by more."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._idle[block] = None
                self._idle.move_to_end(block, last=self._key[block] is not None)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, computed block findable. The first block published under a key stays the one."""
        if self._key[block] is None and key not in self._found:
            self._key[block] = key
            self._found[key] = block

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._found[key]
            self._key[block] = None

    def check(self, tables: Iterable[Seq[int]]) -> None:
        """Assert that ``tables``, the block lists of all live sequences, explain every used block."""
        users = Counter(block for table in tables for block in table)
        for block in range(self.total):
            assert self._users[block] == users[block], (
                f"block {block}: {self._users[block]} users, {users[block]} known"
            )
            assert (block in self._idle) == (users[block] == 0), f"block {block} is both idle and used, or neither"
        assert self.used + self.free == self.total
        assert {key: block for block, key in enumerate(self._key) if key is not None} == self._found
