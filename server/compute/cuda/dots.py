"""The type in which Triton's kernels multiply matrices."""

from typing import Any

import torch
import triton
import triton.language as tl

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def dot_type(dtype: torch.dtype) -> Any:
    """Triton's name of ``dtype``, in which tensor cores multiply and sum in float32.

    The interpreter (3.7) holds bf16 as integers and multiplies those; there, both sides of a product are widened, which
    changes no product.
    """
    return tl.float32 if interpreted() else _TYPES[dtype]
