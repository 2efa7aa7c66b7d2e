"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

import asyncio
from collections.abc import Callable
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from starlette.responses import Response

from server.api.generation.generation import Generation
from server.api.generation.mix import Applied, Mix, lease_mix
from server.api.generation.replies import CHAT, COMPLETION, Head, Shape, StreamReply, WholeReply
from server.api.http.document import APPLIED, answer, refusals
from server.api.schemas.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from server.api.schemas.generation import ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from server.api.service import Served, Service
from server.engine.sequence import SamplingParams, Sequence
from server.errors import ContextOverflow, InvalidRequest

router = APIRouter(prefix="/v1", tags=["completions"])

REFUSALS = refusals(400, 404, 413, 422, 429, 503)

LONG_TEXT = 8192
"""Characters from which a prompt is encoded on a thread, not to hold up the other requests' streams."""


@router.post(
    "/chat/completions",
    responses=answer(ChatCompletion, chunk=ChatCompletionChunk, headers=APPLIED) | REFUSALS,
)
async def create_chat_completion(request: ChatRequest, service: Served) -> Response:
    """An assistant's next turn."""
    service.event_router.check_open()
    turns = [message.turn() for message in request.messages]
    length = sum(len(turn["role"]) + len(turn["content"]) for turn in turns)
    tokens = await _encode(lambda: service.codec.encode_chat(turns), length)
    max_tokens = request.limit or max(service.base.max_model_len - len(tokens), 1)
    _check_length(service, tokens, max_tokens, "messages")
    return _reply(service, request, f"chatcmpl-{uuid4().hex}", tokens, sampling(service, request, max_tokens), CHAT)


@router.post("/completions", responses=answer(Completion, chunk=CompletionChunk, headers=APPLIED) | REFUSALS)
async def create_completion(request: CompletionRequest, service: Served) -> Response:
    """What follows a prompt."""
    service.event_router.check_open()
    tokens = await _encode(lambda: service.codec.encode_prompt(request.prompt), len(request.prompt))
    _check_length(service, tokens, request.limit, "prompt")
    params = sampling(service, request, request.limit)
    return _reply(service, request, f"cmpl-{uuid4().hex}", tokens, params, COMPLETION)


def sampling(service: Service, request: GenerationRequest, max_tokens: int) -> SamplingParams:
    """The engine's parameters; what the request leaves out, or sets to null, has OpenAI's default."""
    given: dict[str, Any] = {
        # The likeliest token alone is what greedy sampling takes.
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
        logit_bias=_logit_bias(service, request),
        max_tokens=max_tokens,
        stop_token_ids=frozenset() if request.ignore_eos else service.base.eos_token_ids,
    )


def _logit_bias(service: Service, request: GenerationRequest) -> tuple[tuple[int, float], ...]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        # Ids are short: int() of a long string is slow, and Python refuses it above some length.
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < service.codec.vocabulary):
            raise InvalidRequest(
                f"Keys of `logit_bias` are token ids, 0 to {service.codec.vocabulary - 1}; {key[:20]!r} is not.",
                param="logit_bias",
            )
        bias[int(key)] = value
    return tuple(bias.items())


async def _encode(encode: Callable[[], list[int]], length: int) -> list[int]:
    return await asyncio.to_thread(encode) if length > LONG_TEXT else encode()


def _check_length(service: Service, tokens: list[int], max_tokens: int, param: str) -> None:
    if len(tokens) + max_tokens > service.base.max_model_len:
        raise ContextOverflow(service.base.max_model_len, len(tokens), max_tokens, param)


def _reply(
    service: Service, request: GenerationRequest, id_: str, tokens: list[int], params: SamplingParams, shape: Shape
) -> Response:
    """Lease, submit, answer. From here on nothing waits until the response has taken over the generation."""
    mix = lease_mix(service.registry, service.base.name, request)
    generation = Generation(service, Sequence(id_, tokens, params, mix.adaptation), mix, request.stop or ())
    head = _head(service, request, id_, mix)
    if request.stream:
        return StreamReply(generation, head, shape, request.stream_options or StreamOptions())
    return WholeReply(generation, head, shape)


def _head(service: Service, request: GenerationRequest, id_: str, mix: Mix) -> Head:
    adapter = [_applied(applied) for applied in mix.applied]
    return Head(id_, int(time()), request.model or service.base.name, service.fingerprint, adapter)


def _applied(applied: Applied) -> dict[str, Any]:
    card = {"name": applied.name, "id": applied.id, "weight": applied.weight}
    return card if applied.alias is None else {**card, "alias": applied.alias}
