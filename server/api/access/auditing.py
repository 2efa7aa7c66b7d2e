"""AuditMiddleware: says who makes the changes of a request, for the audit log (:mod:`adapters.registry.audit`)."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.registry.audit import Actor, acting
from server.access.forbidden import ForbiddenLog
from server.access.key import ApiKey

MAX_ADDRESS = 64
"""Maximum number of characters of an address. Those that a proxy forwards may be any text."""
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class AuditMiddleware:
    """Lets whatever a request changes be recorded with its key, its client's address and its id.

    Changes that its key may not make are recorded, too.
    """

    def __init__(self, app: ASGIApp, forbidden: ForbiddenLog) -> None:
        self._app = app
        self._forbidden = forbidden

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READING:
            await self._app(scope, receive, send)
            return
        actor = actor_of(scope, scope["state"]["key"])

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 403:
                self._forbidden.note(actor, scope["method"], scope["path"])
            await send(message)

        with acting(actor):
            await self._app(scope, receive, send_and_note)


def actor_of(scope: Scope, key: ApiKey) -> Actor:
    """Return who makes a request."""
    client = scope.get("client")
    return Actor(key.id, key.name, client and client[0][:MAX_ADDRESS], scope["state"]["request_id"])
