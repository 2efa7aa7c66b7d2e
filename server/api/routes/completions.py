"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

from fastapi import APIRouter
from starlette.responses import Response

from server.api.access.authentication import KeyDep
from server.api.formats.chat import ChatFormat
from server.api.formats.completion import CompletionFormat
from server.api.generation.adapters import lease_adapters
from server.api.generation.prompts import encode_prompts, map_texts
from server.api.generation.structured import compile_grammar
from server.api.generation.submit import submit
from server.api.generation.submit_chat import submit_chat
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.registry.on_request import fetch_named
from server.api.schemas.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completion import CompletionRequest
from server.api.service import ServiceDep

router = APIRouter(prefix="/v1", tags=["completions"], route_class=JsonRoute)

ERRORS = error_statuses(400, 404, 409, 413, 422, 429, 503, 504, 507)


@router.post(
    "/chat/completions",
    responses=returns(ChatCompletion, chunk=ChatCompletionChunk, headers=ADAPTER_HEADER) | ERRORS,
)
async def create_chat_completion(request: ChatRequest, service: ServiceDep, key: KeyDep) -> Response:
    """Generate the assistant's next message in a conversation."""
    texts = service.codec.token_texts
    return await submit_chat(
        service, key, request, lambda answer, parser: ChatFormat(answer, request, texts, parser), prefix="chatcmpl"
    )


@router.post("/completions", responses=returns(Completion, chunk=CompletionChunk, headers=ADAPTER_HEADER) | ERRORS)
async def create_completion(request: CompletionRequest, service: ServiceDep, key: KeyDep) -> Response:
    """Generate the continuation of a prompt."""
    service.event_router.check_open()
    await fetch_named(service, key, request)
    codec = service.codec
    if suffix := request.suffix:
        prompts = await map_texts(lambda prefix: codec.encode_infilling(prefix, suffix), request.prompt)
    else:
        prompts = await encode_prompts(codec, request.prompt, "prompt")
    echoes = await map_texts(codec.text_of, request.prompt) if request.echo else []
    grammar = await compile_grammar(service, request)
    return await submit(
        service,
        key,
        request,
        prompts,
        request.limit,
        lambda answer: CompletionFormat(answer, request, codec.token_texts, echoes),
        lease_adapters(service, key, request),
        grammar=grammar,
        ends=codec.infilling.ends if request.suffix and codec.infilling else frozenset(),
        prefix="cmpl",
        param="prompt",
    )
