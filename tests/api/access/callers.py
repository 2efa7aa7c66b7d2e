"""Callers: keys of a running server, with the HTTP clients that send them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx
from openai import OpenAI

from server.access.key import ApiKey
from server.access.key_spec import KeySpec
from tests.api.live import PATIENCE, Live

_NUMBERS = count()


@dataclass(frozen=True)
class Caller:
    """A key, its secret, and a client that sends it."""

    key: ApiKey
    secret: str
    http: httpx.Client

    def used(self, **params: Any) -> list[dict[str, Any]]:
        """Return what this caller sees of the usage."""
        response = self.http.get("/v1/usage", params=params)
        assert response.status_code == 200, response.text
        data: list[dict[str, Any]] = response.json()["data"]
        return data

    def changes(self, **params: Any) -> list[dict[str, Any]]:
        """Return entries of the audit log, the latest first."""
        response = self.http.get("/v1/audit", params=params)
        assert response.status_code == 200, response.text
        data: list[dict[str, Any]] = response.json()["data"]
        return data

    def openai(self, **options: Any) -> OpenAI:
        """Return OpenAI's client with this key."""
        return OpenAI(base_url=f"{self.http.base_url}/v1", api_key=self.secret, **{"max_retries": 0, **options})


@contextmanager
def caller(live: Live, *scopes: str, **limits: int) -> Iterator[Caller]:
    """Make a key of a new name."""
    name = f"caller-{next(_NUMBERS)}"
    spec = KeySpec.model_validate({"name": name, "scopes": scopes or ("infer",), "limits": limits})
    stored, secret = live.service.keyring.store.add(spec)
    headers = {"authorization": f"Bearer {secret}"}
    with httpx.Client(base_url=live.http.base_url, timeout=PATIENCE, headers=headers) as http:
        yield Caller(stored.key, secret, http)
