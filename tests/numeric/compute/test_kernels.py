"""What only the C kernels promise: the same bits for a row whatever is beside it, and memory taken at start."""

import os
from threading import Thread

import psutil
import pytest
import torch

from bases import machine
from bases.double_quant import quantise_scales
from bases.nf4 import functional
from server.compute import cpu
from server.compute.attention import AttentionParams, block_bytes
from server.compute.cpu.attention import KernelAttention, KernelKvCache
from server.compute.cpu.kernels import Kernels
from server.compute.cpu.linear import FusedNf4
from server.compute.cpu.packing import PackedNf4
from server.engine.sequence import Batch, Chunk, SamplingParams, Sequence
from tests.numeric.backends import BF16, ODD_SHAPES, nf4_layer

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("rows", [1, 3, 16, 50])
def test_the_nf4_kernel_multiplies_by_what_the_weights_are(kernels: Kernels, rows: int) -> None:
    torch.manual_seed(0)
    layer, weights = nf4_layer(576, 192, bias=True)
    bias = layer.bias.float()
    fused = FusedNf4([layer], kernels)
    x = torch.randn(rows, 576, dtype=BF16)
    mine = kernels.nf4_matmul(x, fused.native)
    torch.testing.assert_close(mine.float(), x.float() @ weights.T + bias, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_the_nf4_kernel_multiplies_layers_of_any_shape(shape: tuple[int, tuple[int, ...]], kernels: Kernels) -> None:
    """Where a row is no multiple of 64, the scale of a weight is that of its block of the whole matrix."""
    torch.manual_seed(0)
    inputs, outs = shape
    layers, weights = zip(*(nf4_layer(inputs, out, bias=True) for out in outs), strict=True)
    biases = [layer.bias.float() for layer in layers]
    fused = FusedNf4(layers, kernels)
    x = torch.randn(50, inputs, dtype=BF16)
    mine = fused(x)
    for y, weight, bias in zip(mine, weights, biases, strict=True):
        torch.testing.assert_close(y.float(), x.float() @ weight.T + bias, rtol=0.02, atol=0.02)
    alone = torch.cat([kernels.nf4_matmul(row.unsqueeze(0), fused.native) for row in x])
    assert torch.equal(torch.cat(mine, 1), alone)
    x[3] = torch.nan
    spoiled = kernels.nf4_matmul(x, fused.native)
    assert spoiled[3].isnan().all()
    assert torch.equal(spoiled[torch.arange(50) != 3], alone[torch.arange(50) != 3])


@pytest.mark.parametrize("nested", [False, True])
def test_whole_blocks_are_packed_as_bitsandbytes_packs_them(nested: bool) -> None:
    layers = [nf4_layer(320, out)[0] for out in (96, 64)]
    for layer in layers:
        if nested:
            quantise_scales(layer.weight.quant_state)
    packed = PackedNf4.of(layers)
    theirs = [
        functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state) for layer in layers
    ]
    assert torch.equal(packed.weight, torch.cat([weight for weight, _ in theirs]))
    assert torch.equal(packed.scales, torch.cat([state.absmax for _, state in theirs], 1))
    assert packed.place is packed.shift is None


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="bitsandbytes' kernel needs AVX512-BF16")
def test_the_nf4_kernel_is_bitsandbytes(kernels: Kernels) -> None:
    torch.manual_seed(0)
    fused = FusedNf4([nf4_layer(576, 192)[0]], kernels)
    x = torch.randn(50, 576, dtype=BF16)
    mine, theirs = kernels.nf4_matmul(x, fused.native), fused.reference(x)
    assert (mine != theirs).float().mean() < 0.01, "more than a last-bit difference here and there"
    torch.testing.assert_close(mine, theirs, rtol=0.01, atol=1e-3)


def test_a_row_of_the_nf4_product_does_not_depend_on_the_others(kernels: Kernels) -> None:
    torch.manual_seed(0)
    fused = FusedNf4([nf4_layer(576, 192)[0]], kernels)
    x = torch.randn(75, 576, dtype=BF16)
    alone = torch.cat([kernels.nf4_matmul(row.unsqueeze(0), fused.native) for row in x])
    for rows in (2, 3, 5, 16, 17, 33, 75):
        assert torch.equal(kernels.nf4_matmul(x[:rows], fused.native), alone[:rows])


def test_strided_input_to_the_nf4_kernel(kernels: Kernels) -> None:
    fused = FusedNf4([nf4_layer(128, 64)[0]], kernels)
    wide = torch.randn(16, 256, dtype=BF16)
    strided = wide[:, :128]
    expected = kernels.nf4_matmul(strided.clone(), fused.native)
    assert torch.equal(kernels.nf4_matmul(strided, fused.native), expected)


def test_memory_for_keys_and_values_is_taken_at_start() -> None:
    """A machine without room for it must fail then, not hours later under load."""
    before = psutil.Process().memory_info().rss
    shapes = {0: (4, 64)}
    cache = cpu.make(torch.device("cpu"), BF16).kv_cache(shapes, 8192, 16)
    taken = psutil.Process().memory_info().rss - before
    assert taken > 0.9 * 8192 * block_bytes(shapes, 16, BF16)
    assert not cache.layers[0][0][-1].any()


def test_the_attention_kernel_gives_a_row_the_same_bits_alone_as_among_many(kernels: Kernels) -> None:
    """Few rows are shared out by heads, many by sequences; neither may show."""
    cache = KernelKvCache({0: (3, 64)}, 200, 16, kernels)
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
    for params in (AttentionParams(0.125), AttentionParams(0.125, window=40)):
        together = KernelAttention(Batch(tuple(chunks)), cache).attend(0, q, k, v, params)
        for row, chunk in enumerate(chunks):
            mine = slice(row, row + 1)
            alone = KernelAttention(Batch((chunk,)), cache).attend(0, q[mine], k[mine], v[mine], params)
            assert torch.equal(alone[0], together[row])


def test_a_key_that_is_not_finite_spoils_no_row_before_it(kernels: Kernels) -> None:
    for bad in (torch.nan, torch.inf):
        cache = KernelKvCache({0: (2, 64)}, 4, 16, kernels)
        sequence = Sequence("s", [1] * 20, SamplingParams())
        sequence.blocks = [0, 1]
        q, k, v = (torch.ones(20, heads, 64, dtype=BF16) for heads in (4, 2, 2))
        k[4] = bad
        k[4, :, ::2] *= -1
        out = KernelAttention(Batch((Chunk(sequence, 0, 20),)), cache).attend(0, q, k, v, AttentionParams(0.125))
        assert out[:4].isfinite().all()
        assert not out[4:].isfinite().any()


def test_threads_are_bound_to_one_cpu_each(kernels: Kernels) -> None:
    """On a thread of its own, so that this one keeps its CPUs."""
    before = os.sched_getaffinity(0)
    cpus = [*sorted(before), *sorted(before)][:2]
    found = []

    def bind() -> None:
        torch.set_num_threads(2)
        assert kernels.bind_threads(cpus)
        found.append(os.sched_getaffinity(0))

    thread = Thread(target=bind)
    thread.start()
    thread.join()
    assert found == [{cpus[0]}]
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(("fewer", "quota", "bound"), [(0, None, True), (1, None, False), (0, 1.5, False)])
def test_threads_are_bound_only_if_they_have_all_cpus_to_themselves(
    fewer: int, quota: float | None, bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers with fewer threads would be bound to the same CPUs; a quota may be spent on any."""
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        pytest.skip("one CPU")
    backend = cpu.make(torch.device("cpu"), BF16)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    found = []

    def bind() -> None:
        torch.set_num_threads(len(cpus) - fewer)
        backend.bind_threads()
        found.append(os.sched_getaffinity(0))

    thread = Thread(target=bind)
    thread.start()
    thread.join()
    assert found == [{min(cpus)} if bound else cpus]
