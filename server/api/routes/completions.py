"""``POST /v1/chat/completions`` and ``POST /v1/completions``.

Both end in :func:`_generate`: lease the adapters, submit a sequence to the engine, and return a response that writes
the text of the answer as it comes.
"""

import asyncio
from collections.abc import Callable
from time import time
from uuid import uuid4

from fastapi import APIRouter
from starlette.responses import Response

from server.api.generation.adapters import lease_adapters
from server.api.generation.generation import Generation
from server.api.generation.responses import CHAT, COMPLETION, EndpointFormat, FullResponse, StreamResponse
from server.api.generation.sampling import sampling_params
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completion import CompletionRequest
from server.api.schemas.generation import GenerationRequest, StreamOptions
from server.api.schemas.responses import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from server.api.service import Service, ServiceDep
from server.engine.sequence import Sequence
from server.errors import ContextOverflow
from server.text.conversation import Conversation

router = APIRouter(prefix="/v1", tags=["completions"])

ERRORS = error_statuses(400, 404, 413, 422, 429, 503)

LONG_TEXT = 8192
"""Characters from which a prompt is encoded on a thread, so that the streams of other requests do not stall."""


@router.post(
    "/chat/completions",
    responses=returns(ChatCompletion, chunk=ChatCompletionChunk, headers=ADAPTER_HEADER) | ERRORS,
)
async def create_chat_completion(request: ChatRequest, service: ServiceDep) -> Response:
    """Generate the assistant's next message in a conversation."""
    service.event_router.check_open()
    messages = [message.for_template() for message in request.messages]
    characters = sum(len(message["role"]) + len(message["content"]) for message in messages)
    prompt = await _encode(lambda: service.codec.encode_chat(Conversation(messages)), characters)
    max_tokens = request.limit or max(service.base.max_model_len - len(prompt), 1)
    return _generate(service, request, prompt, max_tokens, CHAT)


@router.post("/completions", responses=returns(Completion, chunk=CompletionChunk, headers=ADAPTER_HEADER) | ERRORS)
async def create_completion(request: CompletionRequest, service: ServiceDep) -> Response:
    """Generate the continuation of a prompt."""
    service.event_router.check_open()
    prompt = await _encode(lambda: service.codec.encode_prompt(request.prompt), len(request.prompt))
    return _generate(service, request, prompt, request.limit, COMPLETION)


async def _encode(encode: Callable[[], list[int]], characters: int) -> list[int]:
    return await asyncio.to_thread(encode) if characters > LONG_TEXT else encode()


def _generate(
    service: Service, request: GenerationRequest, prompt: list[int], max_tokens: int, form: EndpointFormat
) -> Response:
    """Submit the request to the engine and return the response that writes its answer.

    Nothing here awaits, so the response always takes over the generation, which it closes.
    """
    base = service.base
    if len(prompt) + max_tokens > base.max_model_len:
        raise ContextOverflow(base.max_model_len, len(prompt), max_tokens, form.prompt_field)
    params = sampling_params(request, max_tokens, base.eos_token_ids, service.codec.vocabulary)
    adapters = lease_adapters(service.registry, base.name, request)
    generation = Generation(
        Sequence(f"{form.id_prefix}-{uuid4().hex}", prompt, params, adapters.adaptation),
        adapters,
        request.stop or (),
        codec=service.codec,
        engine=service.engine,
        event_router=service.event_router,
        metrics=service.metrics,
    )
    fields = {
        "created": int(time()),
        "model": request.model or base.name,
        "system_fingerprint": service.fingerprint,
    }
    if request.stream:
        return StreamResponse(generation, fields, form, request.stream_options or StreamOptions())
    return FullResponse(generation, fields, form)
