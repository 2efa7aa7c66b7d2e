"""The dtype in which Triton's kernels multiply matrices."""

from typing import Any

import torch
import triton
import triton.language as tl

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(dtype: torch.dtype) -> Any:
    """Triton's dtype for the operands of ``tl.dot``: ``dtype`` itself. Tensor cores sum in float32.

    Under the interpreter (3.7) float32, because it holds bf16 as integers and would multiply those. Widening both
    operands changes no product.
    """
    interpreted = triton.knobs.runtime.interpret
    return tl.float32 if interpreted else _DTYPES[dtype]
