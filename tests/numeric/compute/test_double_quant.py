"""Double quantisation against a plain reference, and against bitsandbytes' own where that is the same everywhere."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from bases.double_quant import BLOCK, code_table, quantise_scales
from bases.nf4 import functional

from bitsandbytes.autograd._functions import matmul_4bit  # isort: skip - after bases.nf4

LOOKED_UP = 2 / 2**16
"""bitsandbytes looks the code up by the value in 16 bits, so it may miss the nearest entry by this much."""
DRAWS = {
    "gaussian": lambda count: torch.randn(count).abs() + 0.1,
    "six orders of magnitude": lambda count: torch.logspace(-6, 0, count)[torch.randperm(count)],
    "one value": lambda count: torch.full((count,), 0.37),
}


def state_of(scales: torch.Tensor) -> functional.QuantState:
    return functional.QuantState(absmax=scales.clone(), blocksize=64, quant_type="nf4", code=None, shape=None)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("count", [1, 255, 256, 5000])
def test_codes_scales_and_offset_are_those_of_the_reference(draw: str, count: int) -> None:
    torch.manual_seed(count)
    scales = DRAWS[draw](count)
    state = state_of(scales)
    quantise_scales(state)

    exact = sum(Fraction(value) for value in scales.tolist()) / count
    offset = np.float32(float(exact))
    assert state.offset.item() == offset
    rest = scales.numpy() - offset
    table = code_table().numpy()
    for block, first in enumerate(range(0, count, BLOCK)):
        values = rest[first : first + BLOCK]
        largest = np.abs(values).max()
        assert state.state2.absmax[block].item() == largest
        if largest == 0:
            continue
        distances = np.abs((values / largest)[:, None].astype(np.float64) - table)
        chosen = distances[np.arange(len(values)), state.absmax[first : first + BLOCK].numpy()]
        assert (chosen <= distances.min(axis=1) + LOOKED_UP).all()


def test_the_mean_does_not_depend_on_the_order_of_the_scales() -> None:
    torch.manual_seed(0)
    scales = torch.rand(100_003).pow(4)
    states = [state_of(scales), state_of(scales.flip(0)), state_of(scales[torch.randperm(len(scales))])]
    for state in states:
        quantise_scales(state)
    assert len({state.offset.item() for state in states}) == 1


@pytest.mark.parametrize("shape", [(64, 128), (576, 1536)])
def test_bf16_weights_come_out_as_bitsandbytes_has_them(shape: tuple[int, int]) -> None:
    """So that bases that were quantised before keep their fingerprints."""
    torch.manual_seed(1)
    weights = torch.randn(shape).mul(0.05).bfloat16()
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    quantise_scales(state)
    theirs_packed, theirs = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, theirs_packed)
    assert torch.equal(state.absmax, theirs.absmax)
    assert torch.equal(state.state2.absmax, theirs.state2.absmax)
    assert state.offset == theirs.offset
    assert state.nested
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert torch.equal(state.state2.code, theirs.state2.code)
    error = (functional.dequantize_4bit(packed, state).float() - weights.float()).abs().max()
    assert error < 0.03


@pytest.mark.parametrize("shape", [(33, 96), (7, 16), (40, 80), (50, 100), (5, 61), (8, 64), (1, 80)])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_come_out_by_the_scales_of_their_blocks(shape: tuple[int, int], nested: bool) -> None:
    """Where a row is not whole blocks, too: bitsandbytes' kernel takes the scales of other blocks then."""
    torch.manual_seed(1)
    weights = torch.randn(shape).mul(0.05).bfloat16()
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    scales = state.absmax.clone()
    if nested:
        quantise_scales(state)
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: weights.numel()]
    expected = state.code[codes.long()] * scales.repeat_interleave(64)[: weights.numel()]
    found = functional.dequantize_4bit(packed, state).float()
    torch.testing.assert_close(found, expected.view(shape), rtol=0.01, atol=1e-4)
    layer = matmul_4bit(torch.eye(shape[1]), packed, state)  # what a layer's forward calls
    torch.testing.assert_close(layer.T, expected.view(shape), rtol=0.01, atol=1e-4)


def test_the_table_is_one_of_bitsandbytes() -> None:
    theirs = functional.create_dynamic_map()
    assert any(torch.equal(code_table(fused=fused), theirs) for fused in (True, False))
    assert not torch.equal(code_table(fused=True), code_table(fused=False))
    assert torch.equal(code_table(), code_table().sort().values)
