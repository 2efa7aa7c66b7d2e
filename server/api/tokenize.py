"""``POST /tokenize``, as vLLM has it: the token ids that a prompt or messages are served as."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas import MAX_MESSAGES, Message, Name, Schema, Text
from server.api.service import Served
from server.errors import UnknownModel

router = APIRouter()


def _few(value: object) -> object:
    """Counted before any is looked at."""
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"must have at most {MAX_MESSAGES} messages (got {len(value)})")
    return value


class TokenizeRequest(Schema):
    """Either a prompt, as for completions, or messages, as for chat completions."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few)] | None = None
    add_generation_prompt: Literal[True] = True
    """vLLM's field; a request ends where the assistant begins to speak."""

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("unserved", "Give one of `prompt` and `messages`.", {"field": "messages"})
        return self


@router.post("/tokenize")
async def tokenize(request: TokenizeRequest, service: Served) -> dict[str, Any]:
    """Their ids, and how many they are of how many."""
    if request.model not in (None, service.base.name) and not service.registry.knows(request.model):
        raise UnknownModel(request.model)
    tokens = await asyncio.to_thread(_tokens, request, service)
    return {"count": len(tokens), "max_model_len": service.base.max_model_len, "tokens": tokens, "token_strs": None}


def _tokens(request: TokenizeRequest, service: Served) -> list[int]:
    if request.messages is not None:
        return service.codec.encode_chat([message.turn() for message in request.messages])
    assert request.prompt is not None
    return service.codec.encode_prompt(request.prompt)
