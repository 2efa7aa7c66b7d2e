"""Norms, rotary positions and gated SiLU as Triton kernels against transformers' own modules."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from server.compute.attention import IMPLEMENTATION, AttentionParams, register_attention
from tests.numeric.interpreter import DEVICE, need_triton
from tests.tiny import tiny_model

need_triton()

from server.compute.cuda.decoder import TritonDecoder  # noqa: E402 (not where Triton is missing)
from server.compute.cuda.fused_ops import BLOCK_FEATURES, apply_rotary, rms_norm, silu_and_mul  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
"""Of the largest value. The interpreter truncates to bf16 where a GPU rounds; float16 shows whether roundings agree."""
MAY_DIFFER = 0.01
"""Share of float16 values that may differ at all: sums are in another order, and exp is another function."""
ROWS = 5


def check(found: Tensor, expected: Tensor) -> None:
    dtype = expected.dtype
    assert found.dtype == dtype
    assert (found.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    if dtype == torch.float16:
        assert (found != expected).float().mean() < MAY_DIFFER


def rounds_as_torch(dtype: torch.dtype) -> bool:
    """Whether kernels round to ``dtype`` as torch does; the interpreter truncates to bf16."""
    return dtype != torch.bfloat16 or DEVICE.type == "cuda"


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 2).to(DEVICE, dtype)


def norm_of(width: int, dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data += torch.randn(width).to(DEVICE, dtype) * 0.2
    return norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [64, 72, 576, 3000])
@torch.inference_mode()
def test_norm(features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = norm_of(features, dtype), drawn(ROWS, 2 * features, dtype=dtype)[:, :features]
    check(rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_norm_of_a_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x, delta = norm_of(72, dtype), drawn(ROWS, 72, dtype=dtype), drawn(ROWS, 72, dtype=dtype)
    total = x + delta
    found = rms_norm(x, norm.weight, 1e-5, delta)
    if rounds_as_torch(dtype):
        assert torch.equal(x, total)
    check(found, norm(total))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 16), (9, 1, 24), (8, 8, 64), (20, 5, 80)], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@torch.inference_mode()
def test_rotary_positions(shape: tuple[int, int, int], dtype: torch.dtype, normed: bool) -> None:
    torch.manual_seed(0)
    heads, kv_heads, width = shape
    both = drawn(ROWS, (heads + kv_heads) * width, dtype=dtype)
    q, k = both.split([heads * width, kv_heads * width], dim=1)
    angle = torch.rand(ROWS, width) * 6
    cosine, sine = angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)
    norms = norm_of(width, dtype), norm_of(width, dtype)
    before = [t.reshape(ROWS, -1, width) for t in (q, k)]
    if normed:
        before = [norm(t) for norm, t in zip(norms, before, strict=True)]
    expected = apply_rotary_pos_emb(*(t.transpose(0, 1)[None] for t in before), cosine[None], sine[None])
    expected = [t[0].transpose(0, 1).flatten(1) for t in expected]
    apply_rotary(q, k, (cosine, sine), (norms[0].weight, norms[1].weight) if normed else None, 1e-5)
    for found, wanted in zip((q, k), expected, strict=True):
        check(found, wanted)
        if rounds_as_torch(dtype) and not normed:
            assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [96, BLOCK_FEATURES + 7])
@torch.inference_mode()
def test_gated_silu(features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = drawn(ROWS, 2 * features, dtype=dtype).split(features, dim=1)
    gate[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -20.0])
    check(silu_and_mul(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta, weight = drawn(ROWS, 64, dtype=dtype), drawn(ROWS, 64, dtype=dtype), drawn(64, dtype=dtype)
    q, k = drawn(ROWS, 64, dtype=dtype), drawn(ROWS, 32, dtype=dtype)
    angles = drawn(ROWS, 16, dtype=dtype), drawn(ROWS, 16, dtype=dtype)
    norms = drawn(16, dtype=dtype), drawn(16, dtype=dtype)

    def results(rows: slice) -> list[Tensor]:
        a, b, c = x[rows].clone(), q[rows].clone(), k[rows].clone()
        apply_rotary(b, c, (angles[0][rows].contiguous(), angles[1][rows].contiguous()), norms, 1e-5)
        return [rms_norm(a, weight, 1e-5, delta[rows]), a, b, c, silu_and_mul(x[rows], delta[rows])]

    together = results(slice(None))
    for row in range(ROWS):
        for whole, alone in zip(together, results(slice(row, row + 1)), strict=True):
            assert torch.equal(whole[row], alone[0])


class Whole:
    """All rows as one sequence, attended by torch."""

    def __init__(self) -> None:
        self.params: dict[int, AttentionParams] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        self.params[layer] = params
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=params.scale, enable_gqa=True)
        return out[0].transpose(0, 1)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_the_decoder_equals_the_models_forward(architecture: str) -> None:
    torch.manual_seed(0)
    register_attention()
    model = tiny_model(architecture).to(DEVICE)
    model.set_attn_implementation(IMPLEMENTATION)
    ids, positions = torch.randint(0, 200, (1, ROWS), device=DEVICE), torch.arange(3, 3 + ROWS, device=DEVICE)[None]
    keep, hidden_rows, paged = torch.tensor([1, 4], device=DEVICE), torch.tensor([0, 4, 2], device=DEVICE), Whole()
    expected = model(input_ids=ids, position_ids=positions, use_cache=False, paged=paged).logits[0]
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False, paged=paged).last_hidden_state[0]
    decoder = TritonDecoder.if_supported(model, paged.params)
    assert decoder is not None
    torch.testing.assert_close(decoder(ids, positions, paged).logits, expected, rtol=1e-4, atol=1e-4)
    some = decoder(ids, positions, paged, keep, hidden_rows)
    torch.testing.assert_close(some.logits, expected[keep], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(some.hidden, hidden[hidden_rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "phi3"])
def test_models_of_other_shapes_keep_their_modules(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert TritonDecoder.if_supported(tiny_model(architecture), {}) is None
    assert "no kernels for the layers of" in caplog.text


def test_a_model_with_norms_in_another_dtype_keeps_its_modules(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = tiny_model()
    model.model.norm.half()
    assert TritonDecoder.if_supported(model, {}) is None
    assert "its norms are not in torch.float32" in caplog.text
