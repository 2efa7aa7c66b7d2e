"""ETags: the revision of a name, so that a client can make a change only if nobody else has changed it."""

import re
from typing import Annotated

from fastapi import Depends, Header
from pydantic import WithJsonSchema

from server.errors import InvalidRequest

_ETAG = re.compile(r'"([0-9]{1,18})"')


def etag(revision: int) -> dict[str, str]:
    """Return the ETag header for ``revision``."""
    return {"etag": f'"{revision}"'}


async def _expected(
    if_match: Annotated[
        list[str] | None,
        Header(
            description='ETag of an earlier response; 412 if the name has changed since. `"0"` requires a new name.'
        ),
        WithJsonSchema({"type": "string", "pattern": f"^{_ETAG.pattern}$"}),
    ] = None,
    if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> int | None:
    if if_none_match is not None:
        raise InvalidRequest(
            '`If-None-Match` is not supported. To require that the name is new, send `If-Match: "0"`.',
            param="If-None-Match",
        )
    if if_match is None:
        return None
    match = _ETAG.fullmatch(", ".join(if_match).strip())
    if match is None:
        raise InvalidRequest(
            "`If-Match` must be an ETag from an earlier response, one number in quotes.", param="If-Match"
        )
    return int(match[1])


IfMatch = Annotated[int | None, Depends(_expected)]
"""Revision from the ``If-Match`` header; 0 requires that the name is new, None accepts any revision."""
