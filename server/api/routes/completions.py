"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter
from starlette.responses import Response

from server.api.formats.chat import ChatFormat
from server.api.formats.completion import CompletionFormat
from server.api.generation.adapters import lease_adapters
from server.api.generation.chat import LONG_TEXT, make_chat_prompt
from server.api.generation.structured import compile_grammar
from server.api.generation.submit import submit
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.registry.on_request import fetch_named
from server.api.schemas.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completion import CompletionRequest
from server.api.service import Service, ServiceDep

router = APIRouter(prefix="/v1", tags=["completions"], route_class=JsonRoute)

ERRORS = error_statuses(400, 404, 409, 413, 422, 429, 503, 507)

T = TypeVar("T")


@router.post(
    "/chat/completions",
    responses=returns(ChatCompletion, chunk=ChatCompletionChunk, headers=ADAPTER_HEADER) | ERRORS,
)
async def create_chat_completion(request: ChatRequest, service: ServiceDep) -> Response:
    """Generate the assistant's next message in a conversation."""
    service.event_router.check_open()
    await fetch_named(service, request)
    adapters = lease_adapters(service.registry, service.base.name, request)  # the prompt depends on them
    with adapters.released_on_error():
        prompt = await make_chat_prompt(service, request, adapters)
        grammar = await compile_grammar(service, request, prompt.grammar)
    return submit(
        service,
        request,
        [prompt.tokens],
        _chat_limit(request, service, len(prompt.tokens)),
        lambda answer: ChatFormat(answer, request, service.codec.token_texts, prompt.syntax.parser),
        adapters,
        grammar=grammar,
        kept=prompt.kept,
        prefix="chatcmpl",
        param="messages",
    )


@router.post("/completions", responses=returns(Completion, chunk=CompletionChunk, headers=ADAPTER_HEADER) | ERRORS)
async def create_completion(request: CompletionRequest, service: ServiceDep) -> Response:
    """Generate the continuation of a prompt."""
    service.event_router.check_open()
    await fetch_named(service, request)
    codec, length = service.codec, sum(map(len, request.prompt))
    prompts = await _encode(lambda: [codec.encode_prompt(prompt) for prompt in request.prompt], length)
    echoed = request.prompt if request.echo else []
    echoes = await _encode(lambda: [codec.text_of(prompt) for prompt in echoed], length)
    grammar = await compile_grammar(service, request)
    return submit(
        service,
        request,
        prompts,
        request.limit,
        lambda answer: CompletionFormat(answer, request, codec.token_texts, echoes),
        lease_adapters(service.registry, service.base.name, request),
        grammar=grammar,
        prefix="cmpl",
        param="prompt",
    )


def _chat_limit(request: ChatRequest, service: Service, prompt_tokens: int) -> int | None:
    """Return the limit of the answer, or None for the rest of the context. The model's default cannot exceed that."""
    default = service.sampling_defaults.max_new_tokens
    if request.unlimited or default is None:
        return request.limit
    return min(default, max(service.base.max_model_len - prompt_tokens, 1)) if request.limit is None else request.limit


async def _encode(encode: Callable[[], T], characters: int) -> T:
    return await asyncio.to_thread(encode) if characters > LONG_TEXT else encode()
