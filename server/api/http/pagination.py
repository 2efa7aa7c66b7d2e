"""Lists: one JSON object, written in pieces, so that a long one does not hold up other requests."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query
from starlette.responses import StreamingResponse

CHUNK = 500
"""PageReader that are written in one go."""

JsonObject = dict[str, Any]
PageReader = Callable[[str | None, int], Sequence[JsonObject]]
"""The read_page that come after an id (None: from the first), at most so many, in their order."""

After = Annotated[str | None, Query(max_length=512)]
"""The last id of the page before."""
Limit = Annotated[int | None, Query(ge=1)]
"""PageReader in a page; None: all there are."""


def list_response(
    read_page: PageReader, after: str | None, limit: int | None, more: Mapping[str, Any] | None = None
) -> StreamingResponse:
    """A page of read_page, as OpenAI's clients read them: ``{"object": "list", "data": [...], "has_more": ...}``.

    ``more``: what else the object says. What changes while the list is written may or may not be in it.
    """
    return StreamingResponse(_pieces(read_page, after, limit, more or {}), media_type="application/json")


async def _pieces(
    read_page: PageReader, after: str | None, limit: int | None, more: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    yield b'{"object":"list","data":['
    left, has_more, comma = limit, True, b""
    while has_more and left != 0:
        count = CHUNK if left is None else min(CHUNK, left)
        found = read_page(after, count + 1)
        page, has_more = found[:count], len(found) > count
        if page:
            yield comma + b",".join(_dump(card) for card in page)
            after, comma = page[-1]["id"], b","
        left = None if left is None else left - len(page)
        await asyncio.sleep(0)
    yield b"]," + _dump({"has_more": has_more, **more})[1:]


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
