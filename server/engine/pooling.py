"""Pooling: the hidden states of a prompt become one vector."""

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from server.engine.sequence import Chunk


def pool_prompts(hidden: Tensor, chunks: Seq[Chunk]) -> list[bytes | None]:
    """For each chunk the vector of its sequence if it ends the prompt, else the sum so far; None if it is not finite.

    ``hidden`` [rows of all of them, hidden size] float32. Vectors are float32, sums are float64.
    """
    rows, at, pooled = hidden.cpu().numpy(), 0, []
    for chunk in chunks:
        pooled.append(_pool(rows[at : at + len(chunk.read)], chunk))
        at += len(chunk.read)
    return pooled


def _pool(rows: NDArray[np.float32], chunk: Chunk) -> bytes | None:
    sequence = chunk.sequence
    if not np.isfinite(rows).all():
        return None
    vector = rows[-1]
    if sequence.pooling == "mean":
        total = np.zeros(rows.shape[1]) if sequence.hidden is None else np.frombuffer(sequence.hidden).copy()
        for row in rows:  # one by one: the bits must not depend on how the prompt was cut into chunks
            total += row
        if chunk.end < sequence.prompt_length:
            return bytes(total.data)
        vector = (total / sequence.prompt_length).astype(np.float32)
    return bytes(vector.data)
