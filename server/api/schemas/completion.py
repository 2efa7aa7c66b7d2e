"""Schema of ``POST /v1/completions``."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from server.api.schemas.base import Text
from server.api.schemas.generation import (
    MAX_CHOICES,
    UNSUPPORTED,
    GenerationRequest,
    Logprobs,
    Whole,
    field_error,
)
from server.api.schemas.inputs import TextOrTokens, several

DEFAULT_MAX_TOKENS = 16
"""OpenAI's limit for requests that give none."""


def _no_logprobs(value: object) -> object:
    """Some clients send false for none."""
    return None if value is False else value


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
                {"prompt": ["Once", "Twice"], "n": 2, "logprobs": 0},
                {"prompt": "Once", "adapter": [{"name": "legal", "weight": 0.7}, {"name": "german", "weight": 0.3}]},
            ]
        }
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **UNSUPPORTED,
        "add_special_tokens": (True,),
        "prompt_embeds": (),
        "top_logprobs": (0,),
    }

    prompt: Annotated[list[TextOrTokens], several(MAX_CHOICES)]
    """One prompt or several: each a text or a list of token ids."""
    suffix: Text | None = None
    """The text after the answer, for models with tokens for filling in the middle."""
    best_of: Annotated[int, Field(ge=0, le=MAX_CHOICES), Whole] | None = None
    """Generate this many answers to each prompt, and return those with the highest log probability per token."""
    echo: bool | None = None
    """Whether the text begins with the prompt, and the log probabilities with those of its tokens."""
    logprobs: Annotated[Logprobs | None, BeforeValidator(_no_logprobs)] = None
    """Return the log probability of each token, and those of this many most likely tokens."""

    @model_validator(mode="after")
    def _valid(self) -> "CompletionRequest":
        if self.best_of and self.best_of < self.choices:
            raise field_error("best_of", "`best_of` must be at least `n`.")
        if self.stream and self.samples > self.choices:
            raise field_error("best_of", "Answers of `best_of` cannot be streamed: all are compared first.")
        if len(self.prompt) * self.samples > MAX_CHOICES:
            field = "best_of" if self.samples > self.choices else "n" if self.samples > 1 else "prompt"
            raise field_error(field, f"A request may have {MAX_CHOICES} answers, over all of its prompts.")
        if self.max_tokens == 0 and not self.prompt_only:
            raise field_error("max_tokens", "`max_tokens` may be 0 only with `echo` or `prompt_logprobs`.")
        if self.suffix and self.echo:
            raise field_error("echo", "`echo` cannot be combined with `suffix`: the answer stands between two texts.")
        if self.min_tokens and self.limit is not None and self.limit < self.min_tokens:
            raise field_error("min_tokens", f"`min_tokens` must be at most the limit of the answer, {self.limit}.")
        return self

    @property
    def prompt_only(self) -> bool:
        """Whether only the prompts are of interest, and no answer."""
        return self.max_tokens == 0 and (bool(self.echo) or self.prompt_logprobs is not None)

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens in each answer; None for the rest of the context."""
        if self.max_tokens is None:
            return DEFAULT_MAX_TOKENS
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def samples(self) -> int:
        """As in :class:`GenerationRequest`."""
        return max(self.best_of or 0, self.choices)

    @property
    def needed_prompt_logprobs(self) -> int | None:
        """As in :class:`GenerationRequest`: a prompt that is repeated has them, too."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    @property
    def token_logprobs(self) -> int | None:
        """As in :class:`GenerationRequest`."""
        return self.logprobs
