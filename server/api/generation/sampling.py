"""Convert the sampling fields of a request to the engine's SamplingParams."""

from collections.abc import Mapping
from typing import Any

from server.api.schemas.generation import GenerationRequest
from server.engine.sequence import SamplingParams
from server.errors import InvalidRequest


def sampling_params(
    request: GenerationRequest, max_tokens: int, eos_token_ids: frozenset[int], vocabulary: int
) -> SamplingParams:
    """Return the engine's parameters for ``request``. A field that is missing or null gets OpenAI's default.

    ``vocabulary`` is the number of token ids. Raises InvalidRequest if a key of ``logit_bias`` is not one of them.
    """
    given: dict[str, Any] = {
        # A top_p of 0 keeps only the most likely token, which is greedy sampling.
        "temperature": 0.0 if request.top_p == 0 else request.temperature,
        "top_p": request.top_p or None,
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
    }
    return SamplingParams(
        **{name: value for name, value in given.items() if value is not None},
        seed=request.seed,
        logit_bias=_logit_bias(request.logit_bias or {}, vocabulary),
        max_tokens=max_tokens,
        speculation=request.speculation is not False,
        stop_token_ids=frozenset() if request.ignore_eos else eos_token_ids,
    )


def _logit_bias(biases: Mapping[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    for key in biases:
        # The length is checked before int(): parsing a long string is slow, and Python refuses very long ones.
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            raise InvalidRequest(
                f"Keys of `logit_bias` are token ids, 0 to {vocabulary - 1}; {key[:20]!r} is not.", param="logit_bias"
            )
    # "7" and "07" are the same token: the last one counts.
    return tuple({int(key): bias for key, bias in biases.items()}.items())
