"""Every kind of processor computes the same bits: each kernel, compiled for each that this one can stand in for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.compute.cpu.batches import LoraRows, PagedChunks
from server.compute.cpu.kernels import Kernels
from server.compute.cpu.linear import FusedNf4
from server.compute.cpu.structures import Lora
from tests.numeric.backends import BF16, ODD_SHAPES, nf4_layer
from tests.numeric.kernels import runnable

pytestmark = pytest.mark.usefixtures("two_threads")


def assert_the_same(compute: Callable[[Kernels], Tensor]) -> None:
    first, *others = runnable()
    if not others:
        pytest.skip(f"this processor runs {first.variant.name} alone")
    expected = bits(compute(first))
    for kernels in others:
        assert torch.equal(bits(compute(kernels)), expected), f"{kernels.variant.name}, {first.variant.name}"


def bits(x: Tensor) -> Tensor:
    """The values as integers, all NaNs alike: their payloads say nothing."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(integers) if x.is_floating_point() else x


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 40, 100])
@pytest.mark.parametrize("size", [1.0, 1e-21, 1e30])
def test_nf4_products(rows: int, size: float) -> None:
    """Products of tiny inputs are below the normal numbers: they are zeros everywhere. Large ones overflow."""
    torch.manual_seed(rows)
    fused = FusedNf4([nf4_layer(320, 96, bias=True)[0]], runnable()[0])
    x = torch.randn(rows, 320, dtype=BF16) * size * torch.logspace(-8, 8, 320, dtype=BF16)
    assert_the_same(lambda kernels: kernels.nf4_matmul(x, fused.native))


@pytest.mark.parametrize("rows", [1, 5, 33, 70])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_nf4_products_of_odd_shapes(shape: tuple[int, tuple[int, ...]], rows: int) -> None:
    inputs, outs = shape
    torch.manual_seed(rows)
    fused = FusedNf4([nf4_layer(inputs, out, bias=True)[0] for out in outs], runnable()[0])
    x = torch.randn(rows, inputs, dtype=BF16)
    assert_the_same(lambda kernels: kernels.nf4_matmul(x, fused.native))


@pytest.mark.parametrize(("inputs", "outs"), [(32, (208, 64)), (96, (208, 64)), (576, (208, 64)), (100, (201, 50))])
def test_lora(inputs: int, outs: tuple[int, ...]) -> None:
    torch.manual_seed(inputs)
    a = torch.randn(6, 2, (inputs + 31) // 32 * 16, 8, 2, dtype=BF16)
    bs = [torch.randn(6, (out + 15) // 16, 4, 16, 2, dtype=BF16) for out in outs]
    lora = Lora()
    lora.fill(a, bs, outs)
    groups = [([0, 1], [(0, 1.0), (3, 1.0)]), ([2], [(1, 0.7), (2, -0.7)]), (list(range(4, 20)), [(4, 1.0)])]
    rows = LoraRows([*groups, ([3], [(5, 0.3)]), ([20, 22, 24], [(5, 0.3), (0, 1.0)])])
    x, before = torch.randn(26, inputs, dtype=BF16), [torch.randn(26, out, dtype=BF16) for out in outs]

    def compute(kernels: Kernels) -> Tensor:
        outputs = [output.clone() for output in before]
        kernels.lora_rows(x, lora, rows, [0, 1], outputs)
        return torch.cat(outputs, 1)

    assert_the_same(compute)


@pytest.mark.parametrize("shape", [(9, 3, 64), (8, 1, 32), (4, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 5.0)])
def test_attention(shape: tuple[int, int, int], window: int | None, softcap: float | None) -> None:
    """Decode and prefill, whole blocks and parts of one."""
    heads, kv_heads, width = shape
    torch.manual_seed(heads)
    keys, values = (torch.randn(20, kv_heads, 16, width, dtype=BF16).transpose(1, 2) for _ in range(2))
    chunks = [(0, 1, 37, [3, 1, 2]), (1, 1, 100, [4, 5, 6, 7, 8, 9, 10]), (2, 30, 10, [11, 12, 13]), (32, 1, 0, [14])]
    paged = PagedChunks(chunks, 16)
    q = torch.randn(33, heads, width, dtype=BF16)
    assert_the_same(lambda kernels: kernels.attend(q, keys, values, paged, window, width**-0.5, softcap))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_bit_of_attention_scores(rows: int) -> None:
    """Two keys whose scores are large and nearly the same: rounding to bf16 hides a score's last bit anywhere else."""
    torch.manual_seed(0)
    keys, values = (torch.randn(200, 3, 16, 64, dtype=BF16) for _ in range(2))
    keys[:, :, 1] = keys[:, :, 0]
    keys[:, :, 0, 0], keys[:, :, 1, 0] = 0.02, 0.0201
    paged = PagedChunks([(i * rows, rows, 2 - rows, [i]) for i in range(200)], 16)
    q = torch.randn(200 * rows, 9, 64, dtype=BF16) * 10_000
    places = keys.transpose(1, 2), values.transpose(1, 2)
    assert_the_same(lambda kernels: kernels.attend(q, *places, paged, None, 1.0, None))


def test_sampling() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 1003) * torch.tensor([0.1, 1, 4, 10, 30, 100, 3]).unsqueeze(-1)
    logits[6, 3], logits[5, 100:] = torch.nan, -torch.inf
    temperatures, u = torch.tensor([1, 0.7, 2, 1e-3, 1, 5, 1]), torch.rand(7, dtype=torch.float64)
    assert_the_same(lambda kernels: torch.stack([found.double() for found in kernels.row_peaks(logits)]))
    assert_the_same(lambda kernels: kernels.draw_rows(logits, temperatures, u))
    assert_the_same(
        lambda kernels: torch.cat([found.double() for found in kernels.top_rows(logits[:6], temperatures[:6], 20)])
    )
