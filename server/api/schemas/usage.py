"""Schemas of what keys have used, and of the audit log, for the OpenAPI document."""

from typing import Any, Literal

from adapters.registry.audit import Action
from server.api.schemas.responses import Listing, ResponseModel


class Usage(ResponseModel):
    """What was used, summed by what the request groups by; the other fields of these are null."""

    id: str
    object: Literal["usage"]
    day: str | None
    """UTC, as in 2026-11-30."""
    key: str | None
    """Id of the key. Empty for requests to a server without keys."""
    adapter: str | None
    """Version; versions joined by `+` for a mix; empty for the base alone."""
    key_name: str | None
    """Null if this server does not know the key."""
    requests: int
    """Requests that were begun, however they ended."""
    prompt_tokens: int
    """Prompt tokens that were computed, or taken from the prefix cache."""
    cached_tokens: int
    """Those of them from the prefix cache."""
    output_tokens: int


class Usages(Listing):
    """What was used, ordered by day, key and adapter."""

    data: list[Usage]


class AuditEntry(ResponseModel):
    """A change, and who made it."""

    id: str
    object: Literal["audit_entry"]
    created: int
    """Unix time in seconds."""
    action: Action
    name: str
    """What was changed: an adapter, an alias, the name of a key, or the path of a forbidden request."""
    detail: dict[str, Any]
    key: str
    """Id of the key that made the change. Empty on a server without keys, and for the server itself."""
    key_name: str
    """Name of that key; `anonymous`, `server`, or `command line` where there was none."""
    address: str | None
    """Address of the client: of the connection, or from `X-Forwarded-For` if a trusted proxy sent it."""
    request_id: str | None


class AuditEntries(Listing):
    """Changes, the latest first."""

    data: list[AuditEntry]
