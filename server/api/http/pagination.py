"""Paginated lists: one JSON object, written in chunks so that a long list does not block other requests."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query
from starlette.responses import StreamingResponse

from server.api.http.errors import JsonResponse

CHUNK = 500
"""Maximum number of items written before other requests get a turn."""

JsonObject = dict[str, Any]
PageReader = Callable[[str | None, int], Sequence[JsonObject]]
"""Called with (after, count): returns up to ``count`` items that follow the id ``after`` (None: from the start)."""

After = Annotated[str | None, Query(max_length=512)]
"""Id of the last item of the previous page."""
Limit = Annotated[int | None, Query(ge=1)]
"""Maximum number of items in the page; None returns all."""


def list_response(
    read_page: PageReader, after: str | None, limit: int | None, more: Mapping[str, Any] | None = None
) -> StreamingResponse:
    """Return a page in OpenAI's form: ``{"object": "list", "data": [...], "has_more": ...}``.

    ``more`` has additional fields of the object. Items that change while the page is being written may or may not be
    included.
    """
    return StreamingResponse(_write(read_page, after, limit, more or {}), media_type="application/json")


async def _write(
    read_page: PageReader, after: str | None, limit: int | None, more: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    yield b'{"object":"list","data":['
    left, has_more, comma = limit, True, b""
    while has_more and left != 0:
        count = CHUNK if left is None else min(CHUNK, left)
        items = read_page(after, count + 1)
        page, has_more = items[:count], len(items) > count
        if page:
            yield comma + b",".join(_dump(item) for item in page)
            after, comma = page[-1]["id"], b","
        left = None if left is None else left - len(page)
        await asyncio.sleep(0)
    yield b"]," + _dump({"has_more": has_more, **more})[1:]


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


MAX_ROWS = 1000
"""Maximum number of items in a page that is read from the database at once."""
RowLimit = Annotated[int, Query(ge=1, le=MAX_ROWS)]
"""Maximum number of items in such a page."""


def page_response(items: Sequence[JsonObject], limit: int) -> JsonResponse:
    """Return a page of up to ``limit`` of ``items``; there are more if one more was read."""
    return JsonResponse({"object": "list", "data": list(items[:limit]), "has_more": len(items) > limit})
