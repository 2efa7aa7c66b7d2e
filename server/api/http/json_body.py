"""Parse JSON bodies strictly: what Python's parser would accept or drop silently is refused with its place."""

import json
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.schemas.base import MAX_TIMEOUT, TIMEOUT

TIMEOUT_HEADER = "x-request-timeout"
"""Seconds within which an answer must be complete, like the field ``timeout``."""
MAX_DEPTH = 100
"""Maximum number of arrays and objects inside each other. Much deeper values exhaust the stack of later code."""


class MalformedBody(HTTPException):
    """The body cannot be read as JSON. ``param`` is the field at fault, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(400, message)
        self.param = param


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed by :func:`parse_json`. A router takes it as ``route_class``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, but for a :class:`JsonRequest`."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            TIMEOUT.set(read_timeout(request.headers))
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def read_timeout(headers: Headers) -> float | None:
    """Return the seconds that the header ``x-request-timeout`` gives a request. Raises :class:`MalformedBody`."""
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise MalformedBody(
            f"`{TIMEOUT_HEADER}` must be a number of seconds above 0, up to {MAX_TIMEOUT:.0f}.", TIMEOUT_HEADER
        )
    return seconds


class JsonRequest(Request):
    """A request whose JSON body is parsed by :func:`parse_json`."""

    async def body(self) -> bytes:
        """Return the body. Raises :class:`MalformedBody` if the client leaves before it is complete.

        FastAPI would keep the error in a variable beside it, and so all that has come of the body, until Python's
        collector finds the two: it counts objects, and not their bytes.
        """
        try:
            return await super().body()
        except ClientDisconnect:
            raise MalformedBody("The body is not complete.") from None

    async def json(self) -> Any:
        """Return the parsed body. Raises :class:`MalformedBody`."""
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise MalformedBody(f"Bodies with `Content-Encoding: {encoding[:40]}` are not supported; send it plain.")
        return parse_json(await self.body())


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON, with or without a byte order mark.

    Raises :class:`MalformedBody` for anything else, and for repeated keys, numbers that are not finite or have more
    digits than Python converts (4,300), and values nested more than :data:`MAX_DEPTH` deep.
    """
    repeated: list[str] = []
    infinite: list[str] = []

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            repeated.append(_repeated(name for name, _ in pairs))
        return made

    def make_float(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            infinite.append(text)
        return number

    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=make_object, parse_float=make_float, parse_constant=make_float)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body is not valid JSON: it is not UTF-8 at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise MalformedBody(f"The body is not valid JSON: {error.msg} at {error.pos}.") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise MalformedBody("A number in the body has too many digits.") from error
    if repeated:
        raise MalformedBody(f"The body has the field `{repeated[0][:80]}` twice in one object.", repeated[0][:80])
    if infinite or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_values(value)
    return value


def _check_values(value: Any) -> None:
    """Raise :class:`MalformedBody` for a number that is not finite, or a value that is nested too deep."""
    for path, item in _walk(value):
        if len(path) >= MAX_DEPTH and isinstance(item, dict | list):
            raise _too_deep()
        if isinstance(item, float) and not math.isfinite(item):
            place = ".".join(str(part)[:80] for part in path)
            raise MalformedBody(f"Input should be a finite number{f' (in `{place}`)' if place else ''}.", place or None)


def _walk(value: Any) -> Iterator[tuple[Sequence[str | int], Any]]:
    """Yield every value with its path, without recursion. Whole numbers and texts in lists are left out."""
    left: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while left:
        path, item = left.pop()
        yield path, item
        if isinstance(item, dict):
            left += [((*path, key), each) for key, each in item.items() if isinstance(each, dict | list | float)]
        elif isinstance(item, list):
            left += [((*path, i), each) for i, each in enumerate(item) if isinstance(each, dict | list | float)]


def _repeated(names: Iterable[str]) -> str:
    """Return the first name that occurs for the second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise ValueError("no name is repeated")


def _too_deep() -> MalformedBody:
    return MalformedBody(f"The body is nested more than {MAX_DEPTH} levels deep.")
