"""Reads the events of a stream that httpx2 receives."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from loadtests.error_text import server_message

Json = dict[str, Any]


class StreamBroken(Exception):
    """A stream had an error, or no end."""


async def events(response: httpx2.Response) -> AsyncIterator[Json]:
    """Yield the events of a stream. Raises StreamBroken for an error event, and for an end without ``[DONE]``."""
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return
        event: Json = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise StreamBroken(f"an error in the stream: {server_message(json.dumps(event))}")
        yield event
    raise StreamBroken("the stream ended without [DONE]")
