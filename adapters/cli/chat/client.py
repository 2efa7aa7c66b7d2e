"""ChatClient: ask a server's chat endpoint over HTTP, and stream what it answers."""

import json
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

import httpx2

from adapters.cli.chat.speaker import BASE, Speaker
from adapters.cli.client import (
    PAGE,
    JsonObject,
    RemoteError,
    ServerRefused,
    ServerUnreachable,
    key_headers,
    read_object,
    server_address,
)

PATH = "/v1/chat/completions"
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 120.0
"""A server sends a comment every few seconds while a request waits."""
MOST_NAMES = 5000
"""Names that are fetched for completion."""


class ChatClient:
    """The chat endpoint of the server at ``url``. Methods raise :class:`RemoteError`."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """Connects with the first request. Raises ValueError for an invalid address or API key."""
        address = server_address(url)
        self.url = str(address.copy_with(username=None, password=None)).rstrip("/")
        timeout = httpx2.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
        self._http = httpx2.AsyncClient(base_url=address, headers=key_headers(api_key), timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def base(self) -> str:
        """Return the name of the base."""
        page = await self._get("/v1/models", limit=1)
        return str(page["data"][0]["id"])

    async def names(self) -> list[str]:
        """Return what a request may name: the base, adapters, versions and aliases."""
        names: list[str] = []
        more, after = True, dict[str, str]()
        while more and len(names) < MOST_NAMES:
            page = await self._get("/v1/models", limit=PAGE, versions="true", **after)
            names += [str(each["id"]) for each in page["data"]]
            more, after = bool(page.get("has_more") and page["data"]), {"after": names[-1]}
        return names

    async def known(self, speaker: Speaker, base: str) -> Speaker:
        """Return the speaker as requests name it: without parts for the base. Raises if the server has no such one."""
        for name in speaker.names():
            if speaker.parts == ((base, 1.0),):
                return Speaker(base)
            try:
                await self._get(f"/v1/models/{name}")
            except ServerRefused as error:
                if error.status == httpx2.codes.NOT_FOUND and speaker.label == BASE:
                    return Speaker(BASE)
                raise
        return speaker

    async def stream(self, body: JsonObject) -> AsyncGenerator[JsonObject]:
        """Ask, and yield the chunks of the answer. Closing the iterator ends the answer on the server, too."""
        complete = False
        try:
            async with self._http.stream("POST", PATH, json=body) as response:
                if not response.is_success:
                    await response.aread()
                    read_object(response)  # raises ServerRefused
                async for event in httpx2.EventSource(response):
                    if event.data == "[DONE]":
                        complete = True
                        continue
                    yield _chunk(event.data)
        except httpx2.SSEError as error:
            raise ServerRefused(response.status_code, f"{self.url} sent no stream: {error}") from error
        except httpx2.RequestError as error:
            raise ServerUnreachable(self.url, error) from error
        if not complete:
            raise RemoteError(f"{self.url} ended the answer before it was complete")

    async def _get(self, path: str, **query: Any) -> JsonObject:
        try:
            return read_object(await self._http.get(path, params=query))
        except httpx2.RequestError as error:
            raise ServerUnreachable(self.url, error) from error


def _chunk(data: str) -> JsonObject:
    """Parse an event. Raises RemoteError for an error after the first byte of a stream."""
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    match chunk:
        case {"error": {"message": str(message), **rest}}:
            raise RemoteError(f"{message} ({rest['code']})" if rest.get("code") else message)
        case dict():
            return chunk
    raise RemoteError("an event of the stream is no JSON object")
