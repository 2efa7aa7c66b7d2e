"""Convert the sampling fields of a request to the engine's SamplingParams."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from server.api.generation.defaults import SamplingDefaults
from server.api.schemas.generation import GenerationRequest
from server.engine.sequence import SamplingParams
from server.errors import InvalidRequest


def sampling_params(
    request: GenerationRequest, defaults: SamplingDefaults, eos_token_ids: frozenset[int], vocabulary: int
) -> SamplingParams:
    """Return the engine's parameters for ``request``, but for ``max_tokens``.

    A field that is missing or null gets the model's default, or else OpenAI's. ``vocabulary`` is the number of token
    ids. Raises InvalidRequest if ``logit_bias`` or ``stop_token_ids`` names one that the model does not have.
    """
    top_p = _first(request.top_p, defaults.top_p)
    top_k = _first(request.top_k, defaults.top_k)
    given: dict[str, Any] = {
        # A top_p of 0 keeps only the most likely token, which is greedy sampling.
        "temperature": 0.0 if top_p == 0 else _first(request.temperature, defaults.temperature),
        "top_p": top_p or None,
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": _first(request.min_p, defaults.min_p),
        "repetition_penalty": _first(request.repetition_penalty, defaults.repetition_penalty),
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
    }
    stops = _token_ids(request.stop_token_ids or (), vocabulary)
    return SamplingParams(
        **{name: value for name, value in given.items() if value is not None},
        seed=request.seed,
        logit_bias=_logit_bias(request.logit_bias or {}, vocabulary),
        speculation=request.speculation is not False,
        stop_token_ids=stops if request.ignore_eos else eos_token_ids | stops,
        min_tokens=request.min_tokens or 0,
        # Answers are compared by their log probabilities, if more are generated than returned.
        logprobs=_first(request.token_logprobs, 0 if request.samples > request.choices else None),
    )


def params_of_choice(params: SamplingParams, number: int) -> SamplingParams:
    """Return the parameters of a prompt's choice: with a seed, choices after the first get seeds derived from it."""
    if params.seed is None or not number:
        return params
    digest = hashlib.sha256(f"{params.seed}/{number}".encode()).digest()
    return replace(params, seed=int.from_bytes(digest[:8], "big", signed=True))


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def _token_ids(tokens: Iterable[int], vocabulary: int) -> frozenset[int]:
    for token in tokens:
        if token >= vocabulary:
            raise InvalidRequest(
                f"`stop_token_ids` are token ids, 0 to {vocabulary - 1}; {token} is not.", param="stop_token_ids"
            )
    return frozenset(tokens)


def _logit_bias(biases: Mapping[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    for key in biases:
        # The length is checked before int(): parsing a long string is slow, and Python refuses very long ones.
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            raise InvalidRequest(
                f"Keys of `logit_bias` are token ids, 0 to {vocabulary - 1}; {key[:20]!r} is not.", param="logit_bias"
            )
    # "7" and "07" are the same token: the last one counts.
    return tuple({int(key): bias for key, bias in biases.items()}.items())
