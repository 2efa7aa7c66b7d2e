"""Encode the prompts of a request, without holding up the event loop."""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeVar

from server.api.schemas.inputs import TextOrTokens
from server.text.codec import LONG_TEXT, Codec

T = TypeVar("T")


async def encode_prompts(codec: Codec, prompts: Seq[TextOrTokens], param: str) -> list[list[int]]:
    """Return the token ids of each prompt. Raises InvalidRequest for ``param`` if one has no tokens or unknown ids."""
    return await map_texts(lambda prompt: codec.encode_prompt(prompt, param), prompts)


async def map_texts(function: Callable[[TextOrTokens], T], texts: Seq[TextOrTokens]) -> list[T]:
    """Return ``function`` of each text, on a thread if they are long."""

    def work() -> list[T]:
        return [function(text) for text in texts]

    return await asyncio.to_thread(work) if sum(map(len, texts)) > LONG_TEXT else work()
