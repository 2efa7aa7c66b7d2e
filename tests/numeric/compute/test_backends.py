"""Every backend in :data:`server.compute.BACKENDS` against the definition: linear layers, LoRA, attention.

Sampling is in ``test_sampler.py``; whole forward passes are in ``test_parity.py``, ``test_decoder.py`` and
``test_triton_engine.py``.
"""

from collections.abc import Sequence as Seq

import pytest
import torch
from torch import Tensor, nn

from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget
from adapters.format.weights import AdapterWeights
from server.compute import BACKENDS
from server.compute.attention import AttentionParams
from server.compute.backend import Backend
from server.compute.layers import LinearGroup
from server.compute.lora_mapping import make_mapping
from server.compute.pool import AdapterPool, PackedAdapter
from server.compute.reference.attention import attend, attend_reference
from server.compute.reference.backend import ReferenceBackend
from server.engine.sequence import Adaptation, Batch, Chunk, SamplingParams, Sequence, WeightedAdapter
from server.engine.slots import pages_for
from tests.numeric.backends import BF16, nf4_layer, on_test_device
from tests.numeric.oracle import delta_reference

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, BF16: 0.03}

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    # numpy's, under Triton's interpreter
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]


@pytest.fixture(params=BACKENDS, ids=lambda module: module.__name__.rpartition(".")[2])
def module(request: pytest.FixtureRequest) -> object:
    """A folder of ``server/compute``."""
    return request.param


@pytest.fixture(params=[torch.float32, BF16], ids=["fp32", "bf16"])
def backend(module: object, request: pytest.FixtureRequest) -> Backend:
    return on_test_device(module, request.param)


# Linear layers


@pytest.mark.parametrize("outputs", [(96, 32, 64), (48,)], ids=["usual", "odd"])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 40, 64, 130])
@torch.inference_mode()
def test_layers_in_a_group_keep_their_own_weights(module: object, rows: int, outputs: tuple[int, ...]) -> None:
    torch.manual_seed(rows)
    backend = on_test_device(module, BF16)
    layers = [nf4_layer(128, out, bias=out == 32) for out in outputs]
    biases = [layer.bias.float() if layer.bias is not None else 0 for layer, _ in layers]
    compute = backend.group_linear([layer.to(backend.device) for layer, _ in layers])
    x = torch.randn(rows, 128, dtype=BF16)
    for output, (_, weight), bias in zip(compute(x.to(backend.device)), layers, biases, strict=True):
        torch.testing.assert_close(output.cpu().float(), x.float() @ weight.T + bias, rtol=0.02, atol=0.02)


# LoRA


class Lab:
    """One group of three layers, with adapters of several ranks on the device."""

    outputs = (64, 32, 32)
    names = ("m.q_proj", "m.k_proj", "m.v_proj")
    ranks = (4, 16, 64, 8, 1, 20)

    def __init__(self, backend: Backend, inputs: int = 64) -> None:
        torch.manual_seed(0)
        self.layout = BaseLayout("", {n: (inputs, out) for n, out in zip(self.names, self.outputs, strict=True)})
        self.layers = [nn.Linear(inputs, out, bias=False, dtype=backend.dtype) for out in self.outputs]
        self.layers = [layer.to(backend.device) for layer in self.layers]
        self.pool = AdapterPool(64, backend)
        self.group = LinearGroup(self.names, self.layers, self.layout, self.pool)
        self.pool.groups = [self.group]
        self.weights: dict[AdapterId, AdapterWeights] = {}
        free = [*range(0, 64, 2), *range(1, 64, 2)]  # scattered on purpose
        for i, rank in enumerate(self.ranks):
            pages, free = free[: pages_for(rank)], free[pages_for(rank) :]
            self.add(AdapterId(str(i)), rank, tuple(pages), self.names[:1] if i == 3 else self.names)

    def add(self, adapter: AdapterId, rank: int, pages: tuple[int, ...], names: Seq[str], factor: float = 1.0) -> None:
        tensors = {
            name: (factor * torch.randn(rank, inputs) / inputs**0.5, torch.randn(out, rank) * 0.3)
            for name, (inputs, out) in self.layout.linears.items()
            if name in names
        }
        spec = AdapterSpec(adapter, {name: LoraTarget(rank, 1.5) for name in tensors}, 0)
        self.weights[adapter] = AdapterWeights(spec, tensors)
        packed = self.pool.pack(self.weights[adapter])
        self.pool.reserve(packed)
        self.pool.write(pages, packed)
        self.pool.place(adapter, pages, packed)

    def run(self, x: Tensor, batch: Batch) -> list[Tensor]:
        self.pool.mapping = make_mapping(batch, self.pool.resident)
        x = x.to(self.pool.backend.device)
        return [self.group(x, member).cpu() for member in range(3)]

    def base(self, x: Tensor, member: int) -> Tensor:
        return self.layers[member](x.to(self.pool.backend.device)).cpu()

    def expected(self, x: Tensor, adaptations: Seq[Adaptation], member: int) -> Tensor:
        deltas = [
            delta_reference(x[i : i + 1], adaptation, self.names[member], self.weights)
            for i, adaptation in enumerate(adaptations)
        ]
        rows = zip(self.base(x, member).float(), deltas, strict=True)
        return torch.stack([row + delta.expand(1, len(row))[0] for row, delta in rows])


def one(name: str, weight: float = 1.0) -> WeightedAdapter:
    return WeightedAdapter(AdapterId(name), weight, Lab.ranks[int(name)])


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


@pytest.mark.parametrize("lengths", [[1] * 8, [1, 1, 1, 1, 5, 3, 9, 2], [4] * 8], ids=["decode", "both", "prefill"])
@torch.inference_mode()
def test_lora_equals_the_loop_over_adapters(backend: Backend, lengths: list[int]) -> None:
    lab = Lab(backend)
    batch, adaptations = rows_of(MIXED, lengths)
    x = torch.randn(sum(lengths), 64, dtype=backend.dtype)
    for member, output in enumerate(lab.run(x, batch)):
        expected = lab.expected(x, adaptations, member)
        scale = expected.abs().max()
        assert (output.float() - expected).abs().max() < TOLERANCE[backend.dtype] * scale
        for row, adaptation in enumerate(adaptations):
            changed = not torch.equal(output[row], lab.base(x, member)[row])
            targeted = any(lab.names[member] in lab.weights[a.id].tensors for a in adaptation)
            assert changed == targeted, "a row without adapters for this layer must equal the base to the bit"


@torch.inference_mode()
def test_another_adapters_overflow_does_not_leak(module: object) -> None:
    lab = Lab(on_test_device(module, BF16))
    pages, _ = lab.pool.resident[AdapterId("1")]
    lab.add(AdapterId("1"), 16, pages, lab.names, 3e38)
    batch, adaptations = rows_of([(one("0"),), (one("1"),), ()], [1, 1, 1])
    x = torch.ones(3, 64, dtype=BF16)
    output = lab.run(x, batch)[0]
    assert output[[0, 2]].isfinite().all()
    assert not output[1].isfinite().all(), "the test does not provoke an overflow"
    torch.testing.assert_close(output[0].float(), lab.expected(x, adaptations, 0)[0], rtol=0.05, atol=0.05)


@torch.inference_mode()
def test_reused_pages_hold_nothing_of_the_adapter_before(backend: Backend) -> None:
    lab = Lab(backend)
    pages, _ = lab.pool.resident[AdapterId("2")]
    lab.pool.evict(AdapterId("2"))
    lab.add(AdapterId("3"), 8, pages[:1], lab.names[:1])  # targets q only; the adapter before had k and v, too
    batch, adaptations = rows_of([(one("3"),), (one("1"),)], [1, 1])
    x = torch.randn(2, 64, dtype=backend.dtype)
    for member, output in enumerate(lab.run(x, batch)):
        expected, tolerance = lab.expected(x, adaptations, member), TOLERANCE[backend.dtype]
        torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inputs", [64, 34], ids=["lines", "less"])
@pytest.mark.parametrize(
    ("adapter", "pages"), [("5", (3, 4, 9)), ("3", (40,)), ("2", tuple(range(63, 55, -1))), (None, (7, 8))]
)
def test_pages_are_written_as_the_reference_writes_them(
    module: object, adapter: str | None, pages: tuple[int, ...], inputs: int
) -> None:
    backend = on_test_device(module, BF16)
    lab, reference = Lab(backend, inputs), ReferenceBackend(backend.device, BF16)
    nothing = PackedAdapter(16, {}, frozenset(), 0)
    packed = lab.pool.pack(lab.weights[AdapterId(adapter)]) if adapter else nothing
    pairs = list(lab.group.lora.copy_pairs(packed.groups.get(lab.names[0])))
    for mine, _ in pairs:
        mine[list(pages)] = 1
    expected = [(mine.clone(), theirs) for mine, theirs in pairs]
    reference.write_pages(pages, expected)
    lab.pool.write(pages, packed)
    for (mine, _), (copy, _) in zip(pairs, expected, strict=True):
        assert torch.equal(mine, copy)


# Attention


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 5.0), (20, 5.0)])
@pytest.mark.parametrize(("kv_heads", "width", "size"), [(1, 32, 16), (2, 64, 4), (4, 96, 16), (2, 40, 16)])
@torch.inference_mode()
def test_paged_attention_equals_attention_over_the_whole_context(
    backend: Backend, window: int | None, softcap: float | None, kv_heads: int, width: int, size: int
) -> None:
    torch.manual_seed(0)
    heads, device, dtype = 4, backend.device, backend.dtype
    params = AttentionParams(width**-0.5, window, softcap)
    contexts = [(0, 1), (9, 1), (30, 1), (31, 1), (70, 1), (0, 6), (7, 5), (16, 4), (40, 33)]
    cache = backend.kv_cache({0: (kv_heads, width)}, 128, size)
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
    new = [torch.cat([t[c.start :] for t, c in zip(ts, chunks, strict=True)]).to(device) for ts in (keys, values)]
    out = cache.attention(Batch(tuple(chunks))).attend(0, q.to(device), *new, params).cpu()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for rows, chunk, k, v in zip(q.split([c.length for c in chunks]), chunks, keys, values, strict=True):
        mine, out = out[: chunk.length], out[chunk.length :]
        expected = whole_context(rows.float(), k.float(), v.float(), chunk.start, params)
        torch.testing.assert_close(mine.float(), expected, rtol=tolerance, atol=tolerance)


def whole_context(q: Tensor, k: Tensor, v: Tensor, start: int, params: AttentionParams) -> Tensor:
    """Row by row, head by head: q [T, H, D] at positions ``start``.. over k, v [L, KVH, D]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for row in range(len(q)):
        last = start + row + 1
        first = 0 if params.window is None else max(0, last - params.window)
        for head in range(q.shape[1]):
            scores = k[first:last, head // group] @ q[row, head] * params.scale
            if params.softcap:
                scores = torch.tanh(scores / params.softcap) * params.softcap
            out[row, head] = scores.softmax(0) @ v[first:last, head // group]
    return out


def test_fused_attention_without_softcap_equals_the_definition() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    mask = torch.zeros(2, 1, 1, 40).masked_fill_(torch.arange(40) > 30, -torch.inf)
    params = AttentionParams(0.25)
    torch.testing.assert_close(
        attend(q, k, v, mask, params), attend_reference(q, k, v, mask, params), rtol=1e-4, atol=1e-5
    )


@torch.inference_mode()
def test_a_key_that_is_not_finite_makes_rows_that_attend_to_it_not_finite(module: object) -> None:
    """So that their requests fail instead of giving wrong answers."""
    backend = on_test_device(module, BF16)
    for bad in (torch.nan, torch.inf):
        cache = backend.kv_cache({0: (2, 64)}, 4, 16)
        sequence = Sequence("s", [1] * 20, SamplingParams())
        sequence.blocks = [0, 1]
        q, k, v = (torch.ones(20, heads, 64, dtype=BF16) for heads in (4, 2, 2))
        k[4] = bad
        k[4, :, ::2] *= -1
        attention = cache.attention(Batch((Chunk(sequence, 0, 20),)))
        out = attention.attend(0, *(t.to(backend.device) for t in (q, k, v)), AttentionParams(0.125))
        assert not out[4:].isfinite().any()


@torch.inference_mode()
def test_cleared_blocks_hold_zeros(backend: Backend) -> None:
    cache = backend.kv_cache({0: (2, 64), 1: (1, 32)}, 4, 16)
    for layer in cache.layers.values():
        for stored in layer:
            stored.fill_(1)
    cache.clear([1, 3])
    for layer in cache.layers.values():
        for stored in layer:
            assert [bool(block.any()) for block in stored] == [True, False, True, False]
