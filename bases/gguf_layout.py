"""How GGUF files for llama.cpp order the rows of rotary layers. Imports no torch, so that load tests can use it."""

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

Rows = TypeVar("Rows", "np.ndarray[Any, Any]", "torch.Tensor")


def interleave_rotary(rows: Rows, heads: int) -> Rows:
    """Reorder the output rows of ``q_proj`` or ``k_proj``, [heads * head_dim, ...], from transformers to llama.cpp.

    A rotation mixes two dimensions of a head: ``i`` and ``i + head_dim / 2`` in transformers, ``2 * i`` and
    ``2 * i + 1`` in llama.cpp. Returns a copy or a view of the same shape, not always contiguous.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
