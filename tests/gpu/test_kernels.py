"""Triton's kernels at the shapes of an 8B model against the definition in float32, and bitsandbytes' NF4 products.

The same kernels at small shapes, and the engine on them, are in ``tests/numeric/compute/test_triton_*.py``, which run
on a GPU where there is one.
"""

import random

import pytest
import torch
from torch import Tensor

from bases.nf4 import Linear4bit, functional
from server.compute.attention import AttentionParams, PagedChunk
from server.compute.lora_mapping import AdaptedRows
from server.compute.reference.attention import attend_reference

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ROWS, RANK_PAGES, FEATURES, OUTS = 64, 2, 4096, (4096, 1024, 1024)


def nf4(inputs: int, outputs: int) -> tuple[Linear4bit, Tensor]:
    """A quantised layer on the GPU, and its weights dequantised to float32."""
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=BF16, quant_type="nf4")
    layer.weight.data = torch.randn(outputs, inputs, dtype=BF16) * 0.02
    layer = layer.to("cuda").eval().requires_grad_(requires_grad=False)
    return layer, functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 64, 65, 512, 2048])
@torch.inference_mode()
def test_nf4_products_at_every_size(rows: int) -> None:
    torch.manual_seed(rows)
    layer, weight = nf4(FEATURES, 1024)
    x = torch.randn(rows, FEATURES, dtype=BF16, device="cuda")
    expected = x.float() @ weight.T
    assert (layer(x).float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 64])
@torch.inference_mode()
def test_nf4_products_can_be_captured(rows: int) -> None:
    from server.compute.cuda.decode import CudaGraphs

    layer, _ = nf4(FEATURES, 1024)
    x = torch.randn(rows, FEATURES, dtype=BF16, device="cuda")
    replay = CudaGraphs()(lambda: layer(x))
    for _ in range(2):
        x.normal_()
        assert torch.equal(replay(), layer(x))


@torch.inference_mode()
def test_a_captured_lora_step_replays_with_other_adapters() -> None:
    from server.compute.cuda.decode import CudaGraphs
    from server.compute.cuda.lora import add_lora, lora_tiles

    torch.manual_seed(0)
    pages = ROWS * RANK_PAGES
    a = torch.randn(pages, len(OUTS), 8, FEATURES, device="cuda", dtype=BF16) / FEATURES**0.5
    bs = [torch.randn(pages, 8, out, device="cuda", dtype=BF16) for out in OUTS]
    x = torch.randn(ROWS, FEATURES, device="cuda", dtype=BF16)
    base = [torch.randn(ROWS, out, device="cuda", dtype=BF16) for out in OUTS]
    order = list(range(ROWS))
    tiles = lora_tiles(adapted_rows(order), x.device)

    def step() -> Tensor:
        ys = [y.clone() for y in base]
        add_lora(x, a, bs, ys, tiles)
        return torch.cat(ys, dim=1)

    replay = CudaGraphs()(step)
    for seed in range(3):
        random.Random(seed).shuffle(order)
        tiles.pages.copy_(lora_tiles(adapted_rows(order), x.device).pages)
        expected = reference(x, a, bs, base, order)
        found = replay()
        assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()
        assert torch.equal(found, step()), "a replay is the step itself"


def adapted_rows(order: list[int]) -> list[AdaptedRows]:
    """Row i takes adapter order[i]."""
    return [(i, 1, [(RANK_PAGES * n, 1.0), (RANK_PAGES * n + 1, 1.0)]) for i, n in enumerate(order)]


def reference(x: Tensor, a: Tensor, bs: list[Tensor], base: list[Tensor], order: list[int]) -> Tensor:
    """The expected outputs, in float32, row by row."""
    rows = []
    for i, n in enumerate(order):
        own = slice(RANK_PAGES * n, RANK_PAGES * (n + 1))
        rows.append(
            torch.cat(
                [
                    base[j][i].float() + (a[own, j].flatten(0, 1).float() @ x[i].float()) @ b[own].flatten(0, 1).float()
                    for j, b in enumerate(bs)
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("context", [1, 700, 4000])
@pytest.mark.parametrize("new", [1, 256])
@torch.inference_mode()
def test_attention_at_the_shapes_of_an_8b_model(context: int, new: int) -> None:
    from server.compute.cuda.attention import attend, attention_tiles

    if new > context:
        pytest.skip("no chunk is longer than its context")
    torch.manual_seed(0)
    size, sequences = 16, 3
    count = -(-context // size)
    blocks = [random.Random(0).sample(range(sequences * count), sequences * count)[i::sequences] for i in range(3)]
    keys, values = (torch.randn(sequences * count, size, 8, 128, device="cuda", dtype=BF16) for _ in range(2))
    q = torch.randn(sequences * new, 32, 128, device="cuda", dtype=BF16)
    k, v = (torch.randn(sequences * new, 8, 128, device="cuda", dtype=BF16) for _ in range(2))
    tiles = attention_tiles([PagedChunk(i * new, new, context - new, blocks[i]) for i in range(sequences)], 4, q.device)
    out = attend(q, k, v, (keys, values), tiles, AttentionParams(128**-0.5))
    for i in range(sequences):
        whole = [t[blocks[i]].flatten(0, 1)[:context] for t in (keys, values)]
        mine = slice(i * new, (i + 1) * new)
        assert torch.equal(whole[0][context - new :], k[mine]), "new keys are written before anything is read"
        rows = torch.arange(context - new, context, device="cuda").unsqueeze(1)
        seen = torch.arange(context, device="cuda") <= rows
        mask = torch.zeros(seen.shape, device="cuda").masked_fill_(~seen, -torch.inf)
        wide = [t.repeat_interleave(4, 1).transpose(0, 1)[None].float() for t in whole]
        expected = attend_reference(q[mine].float().transpose(0, 1)[None], *wide, mask, AttentionParams(128**-0.5))[0]
        assert (out[mine].float() - expected.transpose(0, 1)).abs().max() < 0.02 * expected.abs().max()
