"""Vectors of embeddings: shortened, normalised, and written as JSON or base64."""

import json
from base64 import b64encode
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from server.errors import EngineError

Vector = NDArray[np.float32]


def unit_vector(pooled: bytes, dimensions: int | None = None) -> Vector:
    """Return a pooled vector, [hidden size] float32 in native byte order, at length 1.

    With ``dimensions``, only its first values are kept, and those have length 1. Raises EngineError if the vector has
    no direction: it is 0, or its values are not finite.
    """
    values = np.frombuffer(pooled, np.float32)[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(values))
    if not 0 < length < np.inf:
        raise EngineError("The model's hidden states are not finite numbers, or all 0.")
    return (values / length).astype(np.float32)


def encode_vector(vector: Vector, encoding: Literal["float", "base64"]) -> bytes:
    """Return the JSON of a vector: a list of numbers, or a string with its bytes in little-endian order in base64."""
    if encoding == "base64":
        return b'"' + b64encode(vector.astype("<f4").tobytes()) + b'"'
    return json.dumps(vector.tolist(), separators=(",", ":")).encode()
