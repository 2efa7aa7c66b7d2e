"""The small operations of a Llama layer as Triton kernels: RMSNorm with the residual, rotary positions, gated SiLU.

transformers' modules take about thirty kernel launches a layer for them, which at few rows cost more than the matrix
products; these take four. They round where those modules round: sums and functions are float32, and what a module
returns from one operator to the next has the model's dtype. Rotary positions are the same to the bit. A mean of squares
is summed in another order and exp is the GPU's, so the last bit of a norm or of a SiLU may differ. A row's result does
not depend on the rest of the batch. Block sizes have not been tuned.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_HEADS = 8
"""Heads that one program rotates."""
BLOCK_FEATURES = 1024
"""Features of gated SiLU that one program computes."""
_BLOCK_HEADS = tl.constexpr(BLOCK_HEADS)


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) of ``x`` [rows, features], after adding ``delta``, if given, to it in place."""
    rows, features = x.shape
    out = torch.empty(rows, features, device=x.device, dtype=x.dtype)
    added = x if delta is None else delta
    block = triton.next_power_of_2(features)
    _rms_norm_kernel[(rows,)](
        *(x, added, weight, out, x.stride(0), added.stride(0), eps),
        **{"features": features, "block": block, "add": delta is not None},
        num_warps=min(16, max(1, block // 512)),
    )
    return out


def apply_rotary(
    q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None = None, eps: float = 0.0
) -> None:
    """Apply rotary positions to q [rows, H * D] and k [rows, KVH * D] in place.

    ``angles``: cosine and sine, each [rows, D], contiguous. ``norms``: weights [D] of q's and k's RMSNorm, for models
    that normalise each head first (Qwen 3), with ``eps``.
    """
    cosine, sine = angles
    head_dim = cosine.shape[1]
    heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    q_norm, k_norm = norms or (cosine, cosine)
    _rotary_kernel[(len(q), triton.cdiv(heads, BLOCK_HEADS) + triton.cdiv(kv_heads, BLOCK_HEADS))](
        *(q, k, cosine, sine, q_norm, k_norm, q.stride(0), k.stride(0), eps),
        **{
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "block_half": triton.next_power_of_2(head_dim // 2),
        },
        normed=norms is not None,
        enable_fp_fusion=False,  # as in transformers, each product is rounded before they are added
    )


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [rows, features] each."""
    rows, features = gate.shape
    out = torch.empty(rows, features, device=gate.device, dtype=gate.dtype)
    _silu_and_mul_kernel[(rows, triton.cdiv(features, BLOCK_FEATURES))](
        *(gate, up, out, gate.stride(0), up.stride(0)), features=features, block=BLOCK_FEATURES
    )
    return out


@triton.jit
def _rms_norm_kernel(
    x, delta, weight, out, x_row, delta_row, eps, features: tl.constexpr, block: tl.constexpr, add: tl.constexpr
):
    """One row. ``add``: whether to add ``delta`` to ``x`` first."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    mask = i < features
    values = tl.load(x + row * x_row + i, mask=mask, other=0)
    if add:
        values = values.to(tl.float32) + tl.load(delta + row * delta_row + i, mask=mask, other=0).to(tl.float32)
        values = values.to(x.dtype.element_ty)
        tl.store(x + row * x_row + i, values, mask=mask)
    exact = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / features + eps)
    scaled = (exact * scale).to(x.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + i, mask=mask, other=0).to(tl.float32)
    tl.store(out + row * features + i, scaled.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_kernel(
    q,
    k,
    cosine,
    sine,
    q_norm,
    k_norm,
    q_row,
    k_row,
    eps,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_half: tl.constexpr,
    normed: tl.constexpr,
):
    """BLOCK_HEADS heads of one row: the programs of k follow those of q."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_blocks = tl.cdiv(heads, _BLOCK_HEADS)
    is_key = block >= query_blocks
    count = tl.where(is_key, kv_heads, heads)
    pointer, weight = q + row * q_row, q_norm
    if is_key:
        pointer, weight = k + row * k_row, k_norm
    head = tl.where(is_key, block - query_blocks, block) * _BLOCK_HEADS + tl.arange(0, _BLOCK_HEADS)
    half: tl.constexpr = head_dim // 2
    i = tl.arange(0, block_half)
    mask = (head < count)[:, None] & (i < half)[None, :]
    pointer += head[:, None] * head_dim + i[None, :]
    first = tl.load(pointer, mask=mask, other=0).to(tl.float32)
    second = tl.load(pointer + half, mask=mask, other=0).to(tl.float32)
    if normed:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / head_dim + eps)[:, None]
        first = _rounded(_rounded(first * scale, q) * tl.load(weight + i, mask=i < half, other=0).to(tl.float32), q)
        second_weight = tl.load(weight + half + i, mask=i < half, other=0).to(tl.float32)
        second = _rounded(_rounded(second * scale, q) * second_weight, q)
    angle = row * head_dim + i
    cos = tl.load(cosine + angle, mask=i < half, other=0).to(tl.float32)
    sin = tl.load(sine + angle, mask=i < half, other=0).to(tl.float32)
    rotated = _rounded(first * cos, q) - _rounded(second * sin, q)
    tl.store(pointer, rotated.to(q.dtype.element_ty), mask=mask)
    cos = tl.load(cosine + angle + half, mask=i < half, other=0).to(tl.float32)
    sin = tl.load(sine + angle + half, mask=i < half, other=0).to(tl.float32)
    rotated = _rounded(second * cos, q) + _rounded(first * sin, q)
    tl.store(pointer + half, rotated.to(q.dtype.element_ty), mask=mask)


@triton.jit
def _rounded(values, like):
    """``values`` rounded to the dtype that ``like`` points to, as float32."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _silu_and_mul_kernel(gate, up, out, gate_row, up_row, features: tl.constexpr, block: tl.constexpr):
    """``block`` features of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    mask = i < features
    x = tl.load(gate + row * gate_row + i, mask=mask, other=0).to(tl.float32)
    silu = _rounded(tl.div_rn(x, 1 + tl.exp(-x)), out)
    silu *= tl.load(up + row * up_row + i, mask=mask, other=0).to(tl.float32)
    tl.store(out + row * features + i, silu.to(out.dtype.element_ty), mask=mask)
