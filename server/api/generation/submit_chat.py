"""Submit a checked chat request, for the format of any of the chat APIs."""

from collections.abc import Callable

from starlette.responses import Response

from server.access.key import ApiKey
from server.api.formats.answer import Answer
from server.api.formats.format import AnswerFormat
from server.api.generation.adapters import lease_adapters
from server.api.generation.chat import make_chat_prompt
from server.api.generation.structured import compile_grammar
from server.api.generation.submit import submit
from server.api.registry.on_request import fetch_named
from server.api.schemas.chat import ChatRequest
from server.api.service import Service
from server.parsers.deltas import MessageParser


async def submit_chat(
    service: Service,
    key: ApiKey,
    request: ChatRequest,
    make_format: Callable[[Answer, Callable[[], MessageParser]], AnswerFormat],
    *,
    prefix: str,
) -> Response:
    """Return a response that writes the answers to a chat request.

    ``make_format`` gets the answer, and what makes a parser for each choice; ``prefix`` begins the answer's id. Raises
    RequestError, AdapterError or EngineError.
    """
    service.event_router.check_open()
    await fetch_named(service, key, request)
    adapters = lease_adapters(service, key, request)  # the prompt depends on them
    with adapters.released_on_error():
        prompt = await make_chat_prompt(service, request, adapters)
        grammar = await compile_grammar(service, request, prompt.grammar)
    return await submit(
        service,
        key,
        request,
        [prompt.tokens],
        _limit(request, service, len(prompt.tokens)),
        lambda answer: make_format(answer, prompt.syntax.parser),
        adapters,
        grammar=grammar,
        kept=prompt.kept,
        prefix=prefix,
        param="messages",
    )


def _limit(request: ChatRequest, service: Service, prompt_tokens: int) -> int | None:
    """Return the limit of the answer, or None for the rest of the context. The model's default cannot exceed that."""
    default = service.sampling_defaults.max_new_tokens
    if request.unlimited or default is None:
        return request.limit
    return min(default, max(service.base.max_model_len - prompt_tokens, 1)) if request.limit is None else request.limit
