"""Sends the requests of a soak's clients, with a key, and checks their statuses."""

import json
import ssl
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from loadtests.drive.streams import Json, StreamBroken, events
from loadtests.error_text import server_message
from loadtests.soak.ledger import Ledger

TIMEOUT = httpx2.Timeout(300.0, connect=60.0)
BUSY = 429
"""Allowed for every request: the server may always say that it has too much to do."""


@dataclass(slots=True)
class Caller:
    """Requests to one server. Each outcome goes into the ledger."""

    url: str
    ledger: Ledger
    headers: Mapping[str, str]
    http: httpx2.AsyncClient = field(init=False)
    _tls: ssl.SSLContext = field(init=False)

    def __post_init__(self) -> None:
        self._tls = ssl.create_default_context()  # once: making one takes longer than most requests
        self.http = self.new_client()

    def new_client(self) -> httpx2.AsyncClient:
        """Return a client with connections of its own, for one who leaves without a word."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx2.AsyncClient(
            base_url=self.url, headers=self.headers, timeout=TIMEOUT, limits=limits, verify=self._tls, trust_env=False
        )

    async def call(
        self, kind: str, method: str, path: str, allowed: Collection[int] = (200,), **content: Any
    ) -> tuple[int, Any]:
        """Return the status and the JSON of an answer, or None for a body that is no JSON.

        A status that is not allowed is a violation, and so is an error that is not in OpenAI's shape.
        """
        try:
            response = await self.http.request(method, path, **content)
        except httpx2.TransportError as error:
            self.lost(kind, path, error)
            return 0, None
        self.check(kind, path, response.status_code, response.text, allowed)
        try:
            return response.status_code, response.json()
        except ValueError:
            return response.status_code, None

    @asynccontextmanager
    async def stream(
        self, kind: str, path: str, body: Json, allowed: Collection[int] = (200,)
    ) -> AsyncIterator[AsyncIterator[Json] | None]:
        """Give the events of a stream, or None if it was refused. A stream that breaks is a violation."""
        try:
            async with self.http.stream("POST", path, json={**body, "stream": True}) as response:
                if response.status_code != httpx2.codes.OK:
                    text = (await response.aread()).decode(errors="replace")
                    self.check(kind, path, response.status_code, text, allowed)
                    yield None
                    return
                yield events(response)
                self.ledger.count(kind, response.status_code)
        except (httpx2.TransportError, StreamBroken) as error:
            self.lost(kind, path, error)

    def lost(self, kind: str, path: str, error: Exception) -> None:
        """Record an answer that was not complete."""
        self.ledger.count(kind, type(error).__name__)
        self.ledger.violate(f"{kind}: {path}: {type(error).__name__} {error}".strip())

    def check(self, kind: str, path: str, status: int, text: str, allowed: Collection[int]) -> None:
        """Count a status; record one that is not allowed."""
        self.ledger.count(kind, status)
        if status not in allowed and status != BUSY:
            self.ledger.violate(f"{kind}: {path}: status {status}, {server_message(text)}")
        elif status >= httpx2.codes.BAD_REQUEST and not _is_error(text):
            self.ledger.violate(f"{kind}: {path}: status {status} without an error in OpenAI's shape: {text[:200]!r}")


def _is_error(text: str) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    match answer:
        case {"error": {"message": str(), "type": str(), "param": _, "code": _}}:
            return True
    return False
