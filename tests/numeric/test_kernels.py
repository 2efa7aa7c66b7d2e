"""Each fast path against the plain one beside it."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import psutil
import pytest
import torch
from torch import Tensor, nn

from adapters.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget
from adapters.weights import AdapterWeights
from bases.nf4 import Linear4bit, functional
from server import native
from server.attention import How, KvCache, PagedBatch, attend, attend_reference
from server.linear import FusedNf4, fuse
from server.lora import LoraGroup, LoraPool, PackedAdapter, _write_pages, delta_reference
from server.plan import Placed, make_plan
from server.sequence import Adaptation, Adapted, Batch, Chunk, SamplingParams, Sequence
from server.slots import pages_for

BF16 = torch.bfloat16


# The base's linear layers


def nf4_layer(inputs: int, outputs: int, *, bias: bool = False) -> tuple[Linear4bit, Tensor]:
    """A quantised layer and its weights as they are after quantisation, float32."""
    layer = Linear4bit(inputs, outputs, bias=bias, compute_dtype=BF16, quant_type="nf4")
    layer.weight.data = torch.randn(outputs, inputs, dtype=BF16) * 0.05
    if bias:
        layer.bias = nn.Parameter(torch.randn(outputs, dtype=BF16))
    layer = layer.to("cpu").eval().requires_grad_(requires_grad=False)
    return layer, functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


needs_avx512_bf16 = pytest.mark.skipif(not functional.has_avx512bf16(), reason="no AVX512-BF16")


@needs_avx512_bf16
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 40, 64, 130])
def test_fused_nf4_is_its_layers(rows: int) -> None:
    torch.manual_seed(rows)
    layers = [nf4_layer(128, outputs, bias=outputs == 32) for outputs in (96, 32, 64)]
    biases = [layer.bias.float() if layer.bias is not None else 0 for layer, _ in layers]
    fused = fuse([layer for layer, _ in layers])
    assert isinstance(fused, FusedNf4)
    x = torch.randn(rows, 128, dtype=BF16)
    for output, (_, weight), bias in zip(fused(x), layers, biases, strict=True):
        torch.testing.assert_close(output.float(), x.float() @ weight.T + bias, rtol=0.02, atol=0.02)


@needs_avx512_bf16
def test_our_nf4_kernel_is_bitsandbytes_and_a_row_does_not_depend_on_the_others() -> None:
    kernels = native.load()
    if kernels is None:
        pytest.skip("no AMX, or no compiler")
    torch.manual_seed(0)
    fused = FusedNf4([nf4_layer(576, 192)[0]])
    x = torch.randn(50, 576, dtype=BF16)
    mine, theirs = kernels.nf4_matmul(x, fused.native), fused.reference(x)
    assert (mine != theirs).float().mean() < 0.01, "more than a last-bit difference here and there"
    torch.testing.assert_close(mine, theirs, rtol=0.01, atol=1e-3)
    alone = torch.cat([kernels.nf4_matmul(row.unsqueeze(0), fused.native) for row in x])
    assert torch.equal(mine, alone)


def test_layers_the_kernel_cannot_take_compute_for_themselves() -> None:
    layer, weight = nf4_layer(128, 48)
    x = torch.randn(3, 128, dtype=BF16)
    (output,) = fuse([layer])(x)
    torch.testing.assert_close(output.float(), x.float() @ weight.T, rtol=0.02, atol=0.02)


# LoRA


class Lab:
    """One group of three layers and adapters of several ranks on the device."""

    outputs = (64, 32, 32)
    names = ("m.q_proj", "m.k_proj", "m.v_proj")
    ranks = (4, 16, 64, 8, 1, 20)

    def __init__(self, dtype: torch.dtype, inputs: int = 64, *, kernel: bool = True) -> None:
        torch.manual_seed(0)
        self.layout = BaseLayout("", {n: (inputs, out) for n, out in zip(self.names, self.outputs, strict=True)})
        self.layers = [nn.Linear(inputs, out, bias=False, dtype=dtype) for out in self.outputs]
        self.pool = LoraPool(64, torch.device("cpu"), dtype, native.load() if kernel else None)
        self.group = LoraGroup(self.names, self.layers, self.layout, self.pool)
        self.pool.groups = [self.group]
        self.weights: dict[AdapterId, AdapterWeights] = {}
        self.placed: dict[AdapterId, tuple[tuple[int, ...], frozenset[str]]] = {}
        free = [*range(0, 64, 2), *range(1, 64, 2)]  # scattered on purpose
        for i, rank in enumerate(self.ranks):
            pages, free = free[: pages_for(rank)], free[pages_for(rank) :]
            self._add(AdapterId(str(i)), rank, tuple(pages), self.names[:1] if i == 3 else self.names)

    def _add(self, adapter: AdapterId, rank: int, pages: tuple[int, ...], names: Seq[str]) -> None:
        tensors = {
            name: (torch.randn(rank, inputs) / inputs**0.5, torch.randn(out, rank) * 0.3)
            for name, (inputs, out) in self.layout.linears.items()
            if name in names
        }
        spec = AdapterSpec(adapter, {name: LoraTarget(rank, 1.5) for name in tensors}, 0)
        self.weights[adapter] = AdapterWeights(spec, tensors)
        self.pool.write(pages, self.pool.pack(self.weights[adapter]))
        self.placed[adapter] = (pages, frozenset(tensors))

    def run(self, x: Tensor, batch: Batch) -> list[Tensor]:
        placed: Placed = self.placed
        self.pool.plan = make_plan(batch, placed, torch.empty(0, dtype=x.dtype))
        return [self.group(x, member) for member in range(3)]

    def expected(self, x: Tensor, adaptations: Seq[Adaptation], member: int) -> Tensor:
        base = self.layers[member](x).float()
        deltas = [
            delta_reference(x[i : i + 1], adaptation, self.names[member], self.weights)
            for i, adaptation in enumerate(adaptations)
        ]
        return torch.stack([row + delta.expand(1, len(row))[0] for row, delta in zip(base, deltas, strict=True)])


def one(name: str, weight: float = 1.0) -> Adapted:
    return Adapted(AdapterId(name), weight, Lab.ranks[int(name)])


MIXED: list[Adaptation] = [
    (),
    (one("0"),),
    (one("2"),),
    (one("1", 0.7), one("3", -0.4)),
    (one("2"),),
    (one("4"),),
    (one("5"), one("2", 0.5), one("0", 2.0)),
    (one("3"),),
]


def rows_of(adaptations: Seq[Adaptation], lengths: Seq[int]) -> tuple[Batch, list[Adaptation]]:
    """Chunks of these lengths (ones first), and the adaptation of every row."""
    chunks = []
    for i, (adaptation, length) in enumerate(zip(adaptations, lengths, strict=True)):
        chunks.append(Chunk(Sequence(str(i), [1] * length, SamplingParams(), adaptation), 0, length))
    return Batch(tuple(chunks)), [a for a, n in zip(adaptations, lengths, strict=True) for _ in range(n)]


TOLERANCE = {torch.float32: 1e-4, BF16: 0.03}


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "spans"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [[1] * 8, [1, 1, 1, 1, 5, 3, 9, 2], [4] * 8], ids=["decode", "both", "prefill"])
@torch.no_grad()
def test_lora_equals_the_loop_over_adapters(dtype: torch.dtype, lengths: list[int], *, kernel: bool) -> None:
    lab = Lab(dtype, kernel=kernel)
    if kernel and lab.group.kernels is None:
        pytest.skip("no kernel for this dtype on this machine")
    batch, adaptations = rows_of(MIXED, lengths)
    x = torch.randn(sum(lengths), 64, dtype=dtype)
    for member, output in enumerate(lab.run(x, batch)):
        expected = lab.expected(x, adaptations, member)
        scale = expected.abs().max()
        assert (output.float() - expected).abs().max() < TOLERANCE[dtype] * scale
        for row, adaptation in enumerate(adaptations):
            changed = not torch.equal(output[row], lab.layers[member](x)[row])
            targeted = any(lab.names[member] in lab.weights[a.id].tensors for a in adaptation)
            assert changed == targeted, "a row without adapters here must be the base to the bit"


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "spans"])
@torch.no_grad()
def test_a_strangers_overflow_does_not_leak(*, kernel: bool) -> None:
    lab = Lab(BF16, kernel=kernel)
    if kernel and lab.group.kernels is None:
        pytest.skip("no kernel on this machine")
    assert lab.group.a is not None
    lab.group.a[list(lab.placed[AdapterId("1")][0])] = 3e38
    batch, adaptations = rows_of([(one("0"),), (one("1"),), ()], [1, 1, 1])
    x = torch.ones(3, 64, dtype=BF16)
    output = lab.run(x, batch)[0]
    assert output[[0, 2]].isfinite().all()
    assert not output[1].isfinite().all(), "the test does not provoke an overflow"
    torch.testing.assert_close(output[0].float(), lab.expected(x, adaptations, 0)[0], rtol=0.05, atol=0.05)


@torch.no_grad()
def test_pages_that_change_hands_hold_nothing_of_the_last_owner() -> None:
    lab = Lab(torch.float32)
    pages, _ = lab.placed.pop(AdapterId("2"))
    lab._add(AdapterId("3"), 8, pages[:1], lab.names[:1])  # targets q only; the owner before it had k and v too
    batch, adaptations = rows_of([(one("3"),), (one("1"),)], [1, 1])
    x = torch.randn(2, 64)
    for member, output in enumerate(lab.run(x, batch)):
        torch.testing.assert_close(output, lab.expected(x, adaptations, member), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [64, 34], ids=["lines", "less"])
@pytest.mark.parametrize(
    ("adapter", "pages"), [("5", (3, 4, 9)), ("3", (40,)), ("2", tuple(range(63, 55, -1))), (None, (7, 8))]
)
def test_the_kernel_places_what_torch_places(adapter: str | None, pages: tuple[int, ...], inputs: int) -> None:
    lab = Lab(BF16, inputs)
    if lab.pool.kernels is None:
        pytest.skip("no kernel on this machine")
    nothing = PackedAdapter(16, {}, frozenset(), 0)
    packed = lab.pool.pack(lab.weights[AdapterId(adapter)]) if adapter else nothing
    expected = []
    for mine, theirs in lab.group.tensors(packed):
        mine[list(pages)] = 1
        expected.append(mine.clone())
        _write_pages(expected[-1], pages, theirs)
    lab.pool.write(pages, packed)
    for (mine, _), copy in zip(lab.group.tensors(packed), expected, strict=True):
        assert torch.equal(mine, copy)


# Attention


@pytest.mark.parametrize("path", ["kernel", "bf16", "fp32"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize(("kv_heads", "width"), [(1, 32), (2, 64), (4, 96)])
def test_paged_attention_equals_attention_over_the_whole_context(
    path: str, window: int | None, softcap: float | None, kv_heads: int, width: int
) -> None:
    torch.manual_seed(0)
    heads, size = 4, 16 if path == "kernel" else 4
    dtype = torch.float32 if path == "fp32" else BF16
    how = How(width**-0.5, window, softcap)
    contexts = [(0, 1), (9, 1), (30, 1), (31, 1), (70, 1), (0, 6), (7, 5), (16, 4), (40, 33)]
    cache = KvCache({0: (kv_heads, width)}, 128, size, torch.device("cpu"), dtype)
    if path == "kernel" and cache.kernels is None:
        pytest.skip("no AMX, or no compiler")
    if path == "bf16":
        cache.kernels = None
    blocks = torch.randperm(128).tolist()
    chunks, keys, values = [], [], []
    for i, (start, length) in enumerate(contexts):
        sequence = Sequence(str(i), [1] * (start + length), SamplingParams())
        sequence.blocks = [blocks.pop() for _ in range(-(-(start + length) // size))]
        k, v = torch.randn(2, start + length, kv_heads, width, dtype=dtype)
        for position in range(start):
            block, offset = sequence.blocks[position // size], position % size
            cache.layers[0][0][block, offset], cache.layers[0][1][block, offset] = k[position], v[position]
        chunks.append(Chunk(sequence, start, length))
        keys.append(k)
        values.append(v)
    q = torch.randn(sum(length for _, length in contexts), heads, width, dtype=dtype) * 3
    new = [torch.cat([t[c.start :] for t, c in zip(ts, chunks, strict=True)]) for ts in (keys, values)]
    batch = PagedBatch(Batch(tuple(chunks)), cache, torch.device("cpu"), dtype)
    out = batch.attend(0, q, *new, how)
    tolerance = 1e-5 if path == "fp32" else 0.02
    for rows, chunk, k, v in zip(q.split([c.length for c in chunks]), chunks, keys, values, strict=True):
        mine, out = out[: chunk.length], out[chunk.length :]
        expected = whole_context(rows.float(), k.float(), v.float(), chunk.start, how)
        torch.testing.assert_close(mine.float(), expected, rtol=tolerance, atol=tolerance)


def test_memory_for_keys_and_values_is_taken_at_start() -> None:
    """A machine without room for it must fail then, not hours later under load."""
    before = psutil.Process().memory_info().rss
    cache = KvCache({0: (4, 64)}, 8192, 16, torch.device("cpu"), BF16)
    taken = psutil.Process().memory_info().rss - before
    assert taken > 0.9 * 8192 * KvCache.block_bytes({0: (4, 64)}, 16, BF16)
    assert not cache.layers[0][0][-1].any()


def test_the_attention_kernel_gives_a_row_the_same_bits_alone_as_among_many() -> None:
    """Few rows are shared out by heads, many by sequences; neither may show."""
    cache = KvCache({0: (3, 64)}, 200, 16, torch.device("cpu"), BF16)
    if cache.kernels is None:
        pytest.skip("no AMX, or no compiler")
    torch.manual_seed(0)
    blocks = torch.randperm(200).tolist()
    chunks = []
    for number in range(24):
        sequence = Sequence(str(number), [1] * (5 * number + 1), SamplingParams())
        sequence.blocks = [blocks.pop() for _ in range(5 * number // 16 + 1)]
        chunks.append(Chunk(sequence, 5 * number, 1))
    for stored in cache.layers[0]:
        stored.normal_()
    q, k, v = (torch.randn(24, heads, 64, dtype=BF16) for heads in (9, 3, 3))
    for how in (How(0.125), How(0.125, window=40)):
        together = PagedBatch(Batch(tuple(chunks)), cache, torch.device("cpu"), BF16).attend(0, q, k, v, how)
        for row, chunk in enumerate(chunks):
            mine = slice(row, row + 1)
            batch = PagedBatch(Batch((chunk,)), cache, torch.device("cpu"), BF16)
            alone = batch.attend(0, q[mine], k[mine], v[mine], how)
            assert torch.equal(alone[0], together[row])


def whole_context(q: Tensor, k: Tensor, v: Tensor, start: int, how: How) -> Tensor:
    """Row by row, head by head: q [T, H, D] at positions ``start``.. over k, v [L, KVH, D]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for row in range(len(q)):
        last = start + row + 1
        first = 0 if how.window is None else max(0, last - how.window)
        for head in range(q.shape[1]):
            scores = k[first:last, head // group] @ q[row, head] * how.scale
            if how.softcap:
                scores = torch.tanh(scores / how.softcap) * how.softcap
            out[row, head] = scores.softmax(0) @ v[first:last, head // group]
    return out


def test_fused_attention_equals_its_definition_with_capped_scores_off() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    mask = torch.zeros(2, 1, 1, 40).masked_fill_(torch.arange(40) > 30, -torch.inf)
    how = How(0.25)
    torch.testing.assert_close(attend(q, k, v, mask, how), attend_reference(q, k, v, mask, how), rtol=1e-4, atol=1e-5)


def test_the_attention_kernel_lets_no_nan_disappear() -> None:
    """A key that is not finite must spoil the rows that see it, so that their request fails instead of lying."""
    cache = KvCache({0: (2, 64)}, 4, 16, torch.device("cpu"), BF16)
    if cache.kernels is None:
        pytest.skip("no AMX, or no compiler")
    for bad in (torch.nan, torch.inf):
        sequence = Sequence("s", [1] * 20, SamplingParams())
        sequence.blocks = [0, 1]
        batch = PagedBatch(Batch((Chunk(sequence, 0, 20),)), cache, torch.device("cpu"), BF16)
        q, k, v = (torch.ones(20, heads, 64, dtype=BF16) for heads in (4, 2, 2))
        k[4] = bad
        k[4, :, ::2] *= -1
        out = batch.attend(0, q, k, v, How(0.125))
        assert out[:4].isfinite().all()
        assert not out[4:].isfinite().any()


def test_strided_input_to_the_nf4_kernel() -> None:
    kernels = native.load()
    if kernels is None:
        pytest.skip("no AMX, or no compiler")
    fused = FusedNf4([nf4_layer(128, 64)[0]])
    wide = torch.randn(16, 256, dtype=BF16)
    strided = wide[:, :128]
    expected = kernels.nf4_matmul(strided.clone(), fused.native)
    assert torch.equal(kernels.nf4_matmul(strided, fused.native), expected)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Kernels that share scratch memory by mistake are right on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
