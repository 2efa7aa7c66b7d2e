"""Schemas of ``POST /v1/embeddings``."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict

from server.api.schemas.answers import AppliedAdapter
from server.api.schemas.base import Count
from server.api.schemas.generation import AdaptedRequest
from server.api.schemas.inputs import TextOrTokens, several
from server.api.schemas.responses import ResponseModel

MAX_INPUTS = 2048
"""As OpenAI's."""


class EmbeddingRequest(AdaptedRequest):
    """``POST /v1/embeddings``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": "The capital of France is Paris."},
                {"input": ["A contract is", "Ein Vertrag ist"], "adapter": "legal", "dimensions": 32},
            ]
        }
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "truncate_prompt_tokens": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "normalize": (True,),
        "use_activation": (True,),
    }
    """vLLM's fields. Vectors are always normalised, and base64 is always float32 in little-endian byte order."""

    input: Annotated[list[TextOrTokens], several(MAX_INPUTS)]
    """Text, token ids, or a list of either."""
    encoding_format: Literal["float", "base64"] | None = None
    """``base64``: the vector's float32 values in little-endian byte order."""
    dimensions: Count | None = None
    """Keep this many of the vector's first values, and normalise those. For models trained for it (Matryoshka)."""
    pooling: Literal["last", "mean"] | None = None
    """How hidden states become one vector: the last token's, or the mean over all tokens. Null: as the server says."""


class Embedding(ResponseModel):
    """The vector of one input."""

    object: Literal["embedding"]
    index: int
    """Position of the input in the request."""
    embedding: list[float] | str
    """Of length 1. A string in base64 if the request asks for that."""


class EmbeddingUsage(ResponseModel):
    """Token counts. An embedding has no answer, so both are the inputs' tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(ResponseModel):
    """The vectors, in the order of the inputs."""

    id: str
    object: Literal["list"]
    created: int
    """Unix time in seconds."""
    model: str
    """Name of the model as in the request."""
    pooling: Literal["last", "mean"]
    """How hidden states became vectors."""
    adapter: list[AppliedAdapter]
    """Adapters applied; empty for the base alone."""
    data: list[Embedding]
    usage: EmbeddingUsage
