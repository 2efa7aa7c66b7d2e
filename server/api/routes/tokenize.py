"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, compatible with vLLM: text to token ids and back."""

import asyncio
from typing import Annotated

from fastapi import APIRouter
from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.access.view import RegistryView
from server.api.access.authentication import KeyDep
from server.api.generation.chat import render_chat
from server.api.http.errors import JsonResponse
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import error_statuses, returns
from server.api.schemas.base import Name, Schema, Text
from server.api.schemas.messages import Message, few_messages
from server.api.schemas.responses import Detokenized, TokenizerInfo, Tokens
from server.api.schemas.templates import TemplateFields
from server.api.service import Service, ServiceDep
from server.errors import InvalidRequest, UnknownModel
from server.text.codec import Codec

MAX_TOKENS = 1 << 19
"""Token ids that are decoded at once."""

router = APIRouter(tags=["tokens"], route_class=JsonRoute)


class TokenizeRequest(TemplateFields):
    """Either a prompt, as for completions, or messages, as for chat completions."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The capital of France is"}]})

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(few_messages)] | None = None
    add_special_tokens: bool | None = None
    """Whether to add the tokenizer's special tokens to a prompt. Null means true, as for completions."""
    return_token_strs: bool | None = None
    """Whether to also return the tokens as strings of the vocabulary."""

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("field", "Give one of `prompt` and `messages`.", {"field": "messages"})
        if self.messages is None and (given := self.model_fields_set.intersection(TemplateFields.model_fields)):
            reason = "Fields for the chat template need `messages`."
            raise PydanticCustomError("field", reason, {"field": min(given)})
        if self.messages is not None and self.add_special_tokens:
            # Chats are never encoded with them: the template already contains the token that begins a text.
            reason = "The chat template writes the special tokens of `messages`."
            raise PydanticCustomError("field", reason, {"field": "add_special_tokens"})
        return self


class DetokenizeRequest(Schema):
    """Token ids, which may include special tokens."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [72, 105]}]})

    model: Name | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS, fail_fast=True)]


@router.post("/tokenize", responses=returns(Tokens) | error_statuses(400, 404, 413))
async def tokenize(request: TokenizeRequest, service: ServiceDep, key: KeyDep) -> JsonResponse:
    """Return the token ids of a prompt or messages, their number, and the model's maximum."""
    view = service.view(key)
    _check_model(request.model, service, view)
    tokens = await _tokens(request, service, view)
    strings = await asyncio.to_thread(_strings, tokens, service.codec) if request.return_token_strs else None
    limit = service.base.max_model_len
    return JsonResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": strings})


@router.post("/detokenize", responses=returns(Detokenized) | error_statuses(400, 404, 413))
async def detokenize(request: DetokenizeRequest, service: ServiceDep, key: KeyDep) -> JsonResponse:
    """Return the text of token ids, including special tokens."""
    _check_model(request.model, service, service.view(key))
    return JsonResponse({"prompt": await asyncio.to_thread(_text, request.tokens, service.codec)})


@router.get("/tokenizer_info", responses=returns(TokenizerInfo))
async def tokenizer_info(service: ServiceDep) -> JsonResponse:
    """Return the base's chat template, and the tokens that begin and end its texts.

    lm-eval's `local-completions` asks for it: if there is an answer, it needs no tokenizer of its own.
    """
    tokenizer, template = service.base.tokenizer, service.codec.template
    special = tokenizer.special_tokens_map
    return JsonResponse(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "model_max_length": service.base.max_model_len,
            "chat_template": template and template.sources.plain,
            **{name: special.get(name) and str(special[name]) for name in ("bos_token", "eos_token", "pad_token")},
        }
    )


def _check_model(model: str | None, service: Service, view: RegistryView) -> None:
    if model not in (None, service.base.name) and not view.knows(model):
        raise UnknownModel(model)


async def _tokens(request: TokenizeRequest, service: Service, view: RegistryView) -> list[int]:
    if request.messages is None:
        return await asyncio.to_thread(_prompt_tokens, request, service.codec)
    conversation = request.make_conversation(request.messages, request.tool_definitions)
    model = request.model
    leases = view.acquire([] if model in (None, service.base.name) else [model])
    try:
        adapters = {model or lease.version.name: lease.version.content for lease in leases}
        return (await render_chat(service, conversation, adapters))[1].tokens
    finally:
        view.release(leases)


def _prompt_tokens(request: TokenizeRequest, codec: Codec) -> list[int]:
    assert request.prompt is not None
    served = codec.encode_prompt(request.prompt)
    if request.add_special_tokens is not False:
        return served
    return list(codec.backend.encode_batch([request.prompt], add_special_tokens=False)[0].ids)


def _strings(tokens: list[int], codec: Codec) -> list[str | None]:
    return [codec.backend.id_to_token(token) for token in tokens]


def _text(tokens: list[int], codec: Codec) -> str:
    for token in tokens:
        if not 0 <= token < codec.vocabulary:
            raise InvalidRequest(f"Token ids are 0 to {codec.vocabulary - 1}; {token} is not.", param="tokens")
    # Unlike decode, decode_batch releases the GIL.
    return str(codec.backend.decode_batch([tokens], skip_special_tokens=False)[0])
