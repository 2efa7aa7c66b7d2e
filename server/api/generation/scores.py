"""Scores: prompts and continuations to tokens, and their log probabilities to scores."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from server.api.formats.logprobs import finite
from server.api.generation.prompt_run import Result
from server.api.schemas.inputs import TextOrTokens
from server.api.schemas.score import ScoreRequest
from server.engine.sequence import PromptLogprobs
from server.errors import InvalidRequest
from server.text.codec import Codec


@dataclass(frozen=True, slots=True)
class Continuation:
    """One continuation of a prompt."""

    prompt: int
    """Position of the prompt in the request."""
    index: int
    """Position of the continuation among those of its prompt."""
    tokens: list[int]
    """Prompt and continuation."""
    start: int
    """Number of tokens of the prompt."""


def encode_continuations(codec: Codec, request: ScoreRequest) -> list[Continuation]:
    """Encode all continuations of a request, each together with its prompt. Call on a thread.

    Raises InvalidRequest if a prompt or a continuation has no tokens.
    """
    found = []
    for prompt, (text, continuations) in enumerate(zip(request.prompt, request.continuations, strict=True)):
        for index, continuation in enumerate(continuations):
            tokens, start = _encode_pair(codec, text, continuation)
            if len(tokens) <= start:
                raise InvalidRequest("A continuation has no tokens of its own.", param="continuations")
            found.append(Continuation(prompt, index, tokens, start))
    return found


def _encode_pair(codec: Codec, prompt: TextOrTokens, continuation: TextOrTokens) -> tuple[list[int], int]:
    """Return the tokens of prompt and continuation, and the number of those before the continuation.

    Two texts are encoded together, for that is how a model has seen them, and divided where the tokens of the prompt
    alone end. White space at the end of the prompt belongs to the continuation: most tokenizers join it to the word
    that follows. lm-eval does the same.
    """
    if isinstance(prompt, str) and isinstance(continuation, str):
        context = prompt.rstrip() or prompt
        return codec.encode_prompt(prompt + continuation), len(codec.encode_prompt(context))
    before = codec.encode_prompt(prompt)
    return [*before, *codec.encode_prompt(continuation, "continuations", special=False)], len(before)


def score(continuation: Continuation, result: Result, *, tokens: bool) -> dict[str, Any]:
    """Return the score of a continuation; with ``tokens``, also its tokens and their log probabilities."""
    assert isinstance(result, PromptLogprobs)
    own = [each for each in islice(result.logprobs, continuation.start, None) if each is not None]
    total = sum(finite(each.logprob) for each in own)
    fields = {
        "object": "score",
        "prompt": continuation.prompt,
        "index": continuation.index,
        "logprob": total,
        "mean_logprob": total / len(own),
        "tokens": len(own),
        "is_greedy": all(each.rank == 1 for each in own),
    }
    if tokens:
        fields["token_ids"] = continuation.tokens[continuation.start :]
        fields["token_logprobs"] = [finite(each.logprob) for each in own]
    return fields
