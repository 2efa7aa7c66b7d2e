"""``POST /v1/responses``: OpenAI's Responses API, without what needs a server with a memory."""

from fastapi import APIRouter
from starlette.responses import Response

from server.api.access.authentication import KeyDep
from server.api.conversion.chat import field_names, validate_chat
from server.api.conversion.responses_api import FIELDS, chat_fields
from server.api.formats.responses_api import ResponsesFormat
from server.api.generation.submit_chat import submit_chat
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.schemas.responses_api.answers import ResponseEvent, ResponseObject
from server.api.schemas.responses_api.requests import ResponsesRequest
from server.api.service import ServiceDep

router = APIRouter(prefix="/v1", tags=["responses"], route_class=JsonRoute)


@router.post(
    "/responses",
    responses=returns(ResponseObject, chunk=ResponseEvent, typed=True, headers=ADAPTER_HEADER)
    | error_statuses(400, 404, 409, 413, 422, 429, 503, 504, 507),
)
async def create_response(request: ResponsesRequest, service: ServiceDep, key: KeyDep) -> Response:
    """Generate the assistant's next items in a conversation. Nothing is kept: send the earlier items each time."""
    chat, texts = validate_chat(chat_fields(request), FIELDS), service.codec.token_texts
    with field_names(FIELDS):
        return await submit_chat(
            service, key, chat, lambda answer, parser: ResponsesFormat(answer, request, texts, parser), prefix="resp"
        )
