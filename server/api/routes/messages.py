"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``: Anthropic's Messages API."""

from fastapi import APIRouter
from starlette.responses import Response

from server.api.access.authentication import KeyDep
from server.api.conversion.anthropic import FIELDS, chat_fields
from server.api.conversion.chat import field_names, validate_chat
from server.api.formats.anthropic import MessagesFormat
from server.api.generation.adapters import lease_adapters
from server.api.generation.chat import make_chat_prompt
from server.api.generation.submit_chat import submit_chat
from server.api.http.errors import JsonResponse
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.registry.on_request import fetch_named
from server.api.schemas.anthropic.answers import AnthropicErrorAnswer, MessageEvent, MessageObject, TokenCount
from server.api.schemas.anthropic.requests import CountTokensRequest, MessagesRequest
from server.api.service import ServiceDep

router = APIRouter(prefix="/v1/messages", tags=["Anthropic"], route_class=JsonRoute)


@router.post(
    "",
    responses=returns(MessageObject, chunk=MessageEvent, typed=True, headers=ADAPTER_HEADER)
    | error_statuses(400, 404, 409, 413, 422, 429, 500, 503, 504, 507, model=AnthropicErrorAnswer),
)
async def create_message(request: MessagesRequest, service: ServiceDep, key: KeyDep) -> Response:
    """Generate the assistant's next message in a conversation."""
    chat = validate_chat(chat_fields(request), FIELDS)
    with field_names(FIELDS):
        return await submit_chat(service, key, chat, MessagesFormat, prefix="msg")


@router.post(
    "/count_tokens",
    responses=returns(TokenCount)
    | error_statuses(400, 404, 409, 413, 422, 429, 500, 503, 507, model=AnthropicErrorAnswer),
)
async def count_tokens(request: CountTokensRequest, service: ServiceDep, key: KeyDep) -> JsonResponse:
    """Return the number of tokens of a conversation, with its system prompt and tools."""
    chat = validate_chat(chat_fields(request), FIELDS)
    await fetch_named(service, key, chat)
    adapters = lease_adapters(service, key, chat)  # the template may be theirs
    try:
        with field_names(FIELDS):
            prompt = await make_chat_prompt(service, chat, adapters)
    finally:
        adapters.release()
    return JsonResponse({"input_tokens": len(prompt.tokens)})
