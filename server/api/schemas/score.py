"""Schemas of ``POST /v1/score``: the log probabilities of continuations."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.answers import AppliedAdapter
from server.api.schemas.generation import AdaptedRequest
from server.api.schemas.inputs import One, TextOrTokens, is_several, several, text_or_tokens
from server.api.schemas.responses import ResponseModel

MAX_PROMPTS = 256
MAX_CONTINUATIONS = 1024
"""In all of a request."""


def _nested(value: object) -> list[list[TextOrTokens]]:
    """Accept a list of continuations, or for several prompts a list of such lists."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of continuations, or for several prompts a list of such lists")
    # [[1, 2]] is one continuation as token ids; [["a"]] and [[[1, 2]]] are lists for several prompts.
    nested = [isinstance(each, list) and (not each or is_several(each)) for each in value]
    lists = value if all(nested) else [value]
    if sum(map(len, lists)) > MAX_CONTINUATIONS:
        raise ValueError(f"must have at most {MAX_CONTINUATIONS} continuations in all (got {sum(map(len, lists))})")
    if not all(lists):
        raise ValueError("must have at least one continuation for each prompt")
    return [[text_or_tokens(each) for each in group] for group in lists]


class ScoreRequest(AdaptedRequest):
    """``POST /v1/score``: how likely each continuation is after its prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "The capital of France is", "continuations": [" Paris", " Rome"]},
                {
                    "prompt": ["The capital of France is", "Two and two is"],
                    "continuations": [[" Paris", " Rome"], [" four"]],
                    "adapter": "legal",
                },
            ]
        }
    )

    prompt: Annotated[list[TextOrTokens], several(MAX_PROMPTS)]
    """Text, token ids, or a list of either."""
    continuations: Annotated[
        list[list[TextOrTokens]],
        BeforeValidator(_nested, json_schema_input_type=list[One] | list[list[One]]),
    ]
    """For one prompt a list of continuations, each a text or token ids; for several prompts one list for each."""
    return_tokens: bool | None = None
    """Whether to also return the tokens of each continuation with their log probabilities."""

    @model_validator(mode="after")
    def _one_list_each(self) -> "ScoreRequest":
        if len(self.prompt) != len(self.continuations):
            reason = (
                f"There are {len(self.prompt)} prompts and {len(self.continuations)} lists of continuations; give one "
                "list for each prompt."
            )
            raise PydanticCustomError("field", reason, {"field": "continuations"})
        return self


class Score(ResponseModel):
    """How likely one continuation is."""

    object: Literal["score"]
    prompt: int
    """Position of the prompt in the request."""
    index: int
    """Position of the continuation among those of its prompt."""
    logprob: float
    """Natural logarithm of the continuation's probability: the sum over its tokens, at temperature 1."""
    mean_logprob: float
    """``logprob`` divided by ``tokens``."""
    tokens: int
    """Number of tokens of the continuation."""
    is_greedy: bool
    """Whether greedy decoding would give this continuation: no other token is more likely than any of its tokens."""
    token_ids: list[int] | None = Field(default=None)
    """The continuation's tokens, if requested."""
    token_logprobs: list[float] | None = Field(default=None)
    """Their log probabilities, if requested."""


class ScoreUsage(ResponseModel):
    """Token counts: prompts and continuations. A prompt counts once for each of its continuations."""

    prompt_tokens: int
    total_tokens: int


class Scores(ResponseModel):
    """The scores of all continuations, in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    """Unix time in seconds."""
    model: str
    """Name of the model as in the request."""
    adapter: list[AppliedAdapter]
    """Adapters applied; empty for the base alone."""
    data: list[Score]
    usage: ScoreUsage
