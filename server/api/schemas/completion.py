"""Schema of ``POST /v1/completions``."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from server.api.schemas.base import encodable
from server.api.schemas.generation import UNSUPPORTED, GenerationRequest


def _single(value: object) -> object:
    """Accept a list with one prompt."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError("one prompt a request; several are not supported")
        return value[0]
    return value


def _prompt(value: object) -> object:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise ValueError("must be a string or a list of token ids")


Prompt = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""A prompt for the OpenAPI document. Token ids are checked later, against the vocabulary."""


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
                {"prompt": "Once", "adapter": [{"name": "legal", "weight": 0.7}, {"name": "german", "weight": 0.3}]},
            ]
        }
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **UNSUPPORTED,
        "logprobs": (False,),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Annotated[
        str | list[int],
        BeforeValidator(_prompt),
        BeforeValidator(_single, json_schema_input_type=Prompt | Annotated[list[Prompt], Field(max_length=1)]),
    ]

    @property
    def limit(self) -> int:
        """Maximum number of tokens in the answer. OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens
