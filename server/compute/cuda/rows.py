"""What a Llama's layer does to each row between its matrix products, as Triton kernels: RMSNorm with the residual,
rotary positions, gated SiLU.

transformers' modules take some thirty launches a layer for them, which at few rows cost more than the products; these
take four. They round where those modules round: sums and functions are float32, what a module returns from one operator
to the next has the model's dtype. Rotary positions are theirs to the bit. A mean of squares is summed in another order
and exp is the processor's, so now and then the last bit of a norm or of a SiLU is another. A row's result does not
depend on the rest of the batch. Block sizes are not measured.
"""

# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Heads that one program rotates."""
WIDTH = 1024
"""Features that one program gates."""
_HEADS = tl.constexpr(HEADS)


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) of ``x`` [rows, features], after adding ``delta`` to it in place."""
    rows, features = x.shape
    out = torch.empty(rows, features, device=x.device, dtype=x.dtype)
    added = x if delta is None else delta
    wide = triton.next_power_of_2(features)
    _norm[(rows,)](
        *(x, added, weight, out, x.stride(0), added.stride(0), eps),
        **{"features": features, "wide": wide, "add": delta is not None},
        num_warps=min(16, max(1, wide // 512)),
    )
    return out


def rotate(
    q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None = None, eps: float = 0.0
) -> None:
    """Rotate q [rows, H * D] and k [rows, KVH * D] in place by cosine and sine, each [rows, D], contiguous.

    ``norms``: weights [D] of q's and k's, where each head has an RMSNorm before (Qwen 3).
    """
    cosine, sine = angles
    width = cosine.shape[1]
    heads, kv_heads = q.shape[1] // width, k.shape[1] // width
    q_norm, k_norm = norms or (cosine, cosine)
    _rotate[(len(q), triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))](
        *(q, k, cosine, sine, q_norm, k_norm, q.stride(0), k.stride(0), eps),
        **{"heads": heads, "kv_heads": kv_heads, "width": width, "wide": triton.next_power_of_2(width // 2)},
        normed=norms is not None,
        enable_fp_fusion=False,  # each product is rounded before they are added
    )


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [rows, features] each."""
    rows, features = gate.shape
    out = torch.empty(rows, features, device=gate.device, dtype=gate.dtype)
    _gate[(rows, triton.cdiv(features, WIDTH))](
        *(gate, up, out, gate.stride(0), up.stride(0)), features=features, width=WIDTH
    )
    return out


@triton.jit
def _norm(x, delta, weight, out, x_row, delta_row, eps, features: tl.constexpr, wide: tl.constexpr, add: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, wide)
    there = i < features
    values = tl.load(x + row * x_row + i, mask=there, other=0)
    if add:
        values = values.to(tl.float32) + tl.load(delta + row * delta_row + i, mask=there, other=0).to(tl.float32)
        values = values.to(x.dtype.element_ty)
        tl.store(x + row * x_row + i, values, mask=there)
    exact = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / features + eps)
    scaled = (exact * scale).to(x.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + i, mask=there, other=0).to(tl.float32)
    tl.store(out + row * features + i, scaled.to(out.dtype.element_ty), mask=there)


@triton.jit
def _rotate(
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
    width: tl.constexpr,
    wide: tl.constexpr,
    normed: tl.constexpr,
):
    """Some heads of one row: the programs of k follow those of q."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    before = tl.cdiv(heads, _HEADS)
    of_k = block >= before
    count = tl.where(of_k, kv_heads, heads)
    at, weight = q + row * q_row, q_norm
    if of_k:
        at, weight = k + row * k_row, k_norm
    head = tl.where(of_k, block - before, block) * _HEADS + tl.arange(0, _HEADS)
    half: tl.constexpr = width // 2
    i = tl.arange(0, wide)
    there = (head < count)[:, None] & (i < half)[None, :]
    at += head[:, None] * width + i[None, :]
    left = tl.load(at, mask=there, other=0).to(tl.float32)
    right = tl.load(at + half, mask=there, other=0).to(tl.float32)
    if normed:
        scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / width + eps)[:, None]
        left = _rounded(_rounded(left * scale, q) * tl.load(weight + i, mask=i < half, other=0).to(tl.float32), q)
        below = tl.load(weight + half + i, mask=i < half, other=0).to(tl.float32)
        right = _rounded(_rounded(right * scale, q) * below, q)
    angle = row * width + i
    cos = tl.load(cosine + angle, mask=i < half, other=0).to(tl.float32)
    sin = tl.load(sine + angle, mask=i < half, other=0).to(tl.float32)
    turned = _rounded(left * cos, q) - _rounded(right * sin, q)
    tl.store(at, turned.to(q.dtype.element_ty), mask=there)
    cos = tl.load(cosine + angle + half, mask=i < half, other=0).to(tl.float32)
    sin = tl.load(sine + angle + half, mask=i < half, other=0).to(tl.float32)
    turned = _rounded(right * cos, q) + _rounded(left * sin, q)
    tl.store(at + half, turned.to(q.dtype.element_ty), mask=there)


@triton.jit
def _rounded(values, like):
    """To the dtype that ``like`` points to, and back."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _gate(gate, up, out, gate_row, up_row, features: tl.constexpr, width: tl.constexpr):
    """``width`` features of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * width + tl.arange(0, width)
    there = i < features
    x = tl.load(gate + row * gate_row + i, mask=there, other=0).to(tl.float32)
    silu = _rounded(tl.div_rn(x, 1 + tl.exp(-x)), out)
    silu *= tl.load(up + row * up_row + i, mask=there, other=0).to(tl.float32)
    tl.store(out + row * features + i, silu.to(out.dtype.element_ty), mask=there)
