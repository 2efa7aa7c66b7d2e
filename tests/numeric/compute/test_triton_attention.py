"""Triton's paged attention against the definition: compiled on a GPU, else interpreted on the CPU."""

import random
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from server.compute.attention import AttentionParams, PagedChunk
from server.compute.reference.attention import attend_reference
from tests.numeric.interpreter import DEVICE, need_triton

need_triton()

from server.compute.cuda.attention import BLOCK_KEYS, KV_SPLITS, attend, attention_tiles  # noqa: E402 (not where Triton is missing)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PLAIN = AttentionParams(scale=0.2)
KINDS = {
    "plain": PLAIN,
    "window": AttentionParams(0.2, window=12),
    "capped": AttentionParams(0.5, softcap=2.0),
    "both": AttentionParams(0.5, 70, 2.0),
}


@dataclass
class Cache:
    """A KV cache with sequences of random keys and values, in blocks that are scattered on purpose."""

    heads: int = 4
    kv_heads: int = 2
    width: int = 24
    size: int = 4
    dtype: torch.dtype = torch.float32
    contexts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)

    def fill(self, lengths: list[int]) -> "Cache":
        """Random keys and values [length, KVH, D] for each sequence."""
        counts = [-(-n // self.size) for n in lengths]
        free = random.Random(0).sample(range(sum(counts) + 3), sum(counts))
        self.store = tuple(torch.zeros(sum(counts) + 3, self.size, *self.shape) for _ in range(2))
        for length, count in zip(lengths, counts, strict=True):
            self.blocks.append([free.pop() for _ in range(count)])
            self.contexts.append((self.draw(length, self.kv_heads), self.draw(length, self.kv_heads)))
            for whole, one in zip(self.store, self.contexts[-1], strict=True):
                for position in range(length):
                    whole[self.blocks[-1][position // self.size], position % self.size] = one[position]
        self.store = tuple(t.to(DEVICE, self.dtype) for t in self.store)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.kv_heads, self.width

    def draw(self, rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, self.width).to(self.dtype)

    def ends(self, lengths: list[int], params: AttentionParams) -> tuple[Tensor, Tensor]:
        """Attend from the last ``lengths`` rows of each sequence: the kernels' result, and the definition's."""
        queries = [self.draw(n, self.heads) for n in lengths]
        chunks, new, expected = [], [], []
        starts = accumulate(lengths, initial=0)
        for row, length, q, blocks, (k, v) in zip(starts, lengths, queries, self.blocks, self.contexts, strict=False):
            chunks.append(PagedChunk(row, length, len(k) - length, blocks))
            new.append((k[len(k) - length :], v[len(k) - length :]))
            expected.append(self.reference(q, k, v, params))
            for position in range(len(k) - length, len(k)):
                for whole in self.store:
                    whole[blocks[position // self.size], position % self.size] = torch.nan  # attend() writes it
        k, v = (torch.cat(t).to(DEVICE) for t in zip(*new, strict=True))
        q = torch.cat(queries).to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)  # as transformers gives it
        tiles = attention_tiles(chunks, self.heads // self.kv_heads, DEVICE)
        return attend(q, k, v, self.store, tiles, params).cpu(), torch.cat(expected)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Attention of the last len(q) rows over a context [L, KVH, D], by the definition."""
        rows = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
        visible = torch.arange(len(k)) <= rows
        if params.window is not None:
            visible &= torch.arange(len(k)) > rows - params.window
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        wide_k, wide_v = (t.repeat_interleave(self.heads // self.kv_heads, 1).transpose(0, 1)[None] for t in (k, v))
        out = attend_reference(q.float().transpose(0, 1)[None], wide_k, wide_v, mask, params)
        return out[0].transpose(0, 1)


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (found.float() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_and_prefill(dtype: torch.dtype, params: AttentionParams) -> None:
    torch.manual_seed(0)
    cache = Cache(dtype=dtype).fill([1, 3, 77, BLOCK_KEYS + 9, 30, 96])
    check(*cache.ends([1, 1, 1, 1, 30, 40], params), dtype)


@pytest.mark.parametrize("shape", [(4, 4, 16, 4), (6, 1, 16, 3), (5, 1, 80, 16), (70, 1, 8, 4)], ids=str)
def test_heads_and_blocks_of_any_size(shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    cache = Cache(*shape).fill([70, 9, 12])
    check(*cache.ends([1, 1, 7], PLAIN), torch.float32)


@pytest.mark.parametrize("window", [None, 2 * BLOCK_KEYS], ids=["all", "window"])
def test_a_decode_row_with_more_keys_than_its_splits_read_in_one_step(window: int | None) -> None:
    torch.manual_seed(0)
    cache = Cache(2, 1, 16).fill([(KV_SPLITS + 2) * BLOCK_KEYS + 5])
    check(*cache.ends([1], AttentionParams(0.2, window)), torch.float32)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [20, 30, 5]], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    contexts = [100, 64, 90]
    found = []
    for alone in (None, 0, 1, 2):
        torch.manual_seed(1)
        cache = Cache(dtype=dtype).fill(contexts)
        queries = [cache.draw(n, cache.heads) for n in lengths]
        chosen = [0, 1, 2] if alone is None else [alone]
        starts = accumulate((lengths[i] for i in chosen), initial=0)
        chunks = [
            PagedChunk(row, lengths[i], contexts[i] - lengths[i], cache.blocks[i])
            for row, i in zip(starts, chosen, strict=False)
        ]
        k, v = (torch.cat([cache.contexts[i][side][-lengths[i] :] for i in chosen]).to(DEVICE) for side in (0, 1))
        q = torch.cat([queries[i] for i in chosen]).to(DEVICE)
        found.append(attend(q, k, v, cache.store, attention_tiles(chunks, 2, DEVICE), PLAIN))
    assert torch.equal(found[0], torch.cat(found[1:]))


def test_how_a_prompt_is_chunked_does_not_matter() -> None:
    torch.manual_seed(0)
    cache = Cache().fill([150])
    ((k, v),), (blocks,) = cache.contexts, cache.blocks
    q = cache.draw(150, cache.heads)
    whole = []
    for cuts in ([0, 150], [0, 37, 39, 120, 150]):
        rows = []
        for start, end in pairwise(cuts):
            tiles = attention_tiles([PagedChunk(0, end - start, start, blocks[: -(-end // cache.size)])], 2, DEVICE)
            of = [t[start:end].to(DEVICE) for t in (q, k, v)]
            rows.append(attend(*of, cache.store, tiles, PLAIN))
        whole.append(torch.cat(rows))
    torch.testing.assert_close(whole[0], whole[1], rtol=1e-6, atol=1e-6)  # the interpreter's products are numpy's


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("length", [1, 3], ids=["decode", "prefill"])
def test_other_sequences_and_later_positions_are_not_read_and_a_nan_stays_a_nan(length: int) -> None:
    torch.manual_seed(0)
    cache = Cache().fill([9, 5])
    for t in cache.store:
        for block in set(range(len(t))) - set(cache.blocks[0]):
            t[block] = torch.nan
        t[cache.blocks[0][-1], 1:] = torch.nan
    q, k, v = (cache.draw(2 * length, heads).to(DEVICE) for heads in (4, 2, 2))
    chunks = [
        PagedChunk(0, length, 9 - length, cache.blocks[0]),
        PagedChunk(length, length, 5 - length, cache.blocks[1]),
    ]
    out = attend(q, k, v, cache.store, attention_tiles(chunks, 2, DEVICE), PLAIN)
    assert out[:length].isfinite().all()
    assert not out[length:].isfinite().any()
