"""MeteringMiddleware: holds requests that generate to the limits of their key, and counts what they use."""

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import AdapterError
from server.access.key import ApiKey
from server.access.limits import limited
from server.access.usage import METER, UsageLedger
from server.api.http.errors import error_response
from server.errors import RateLimited

GENERATING = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/score"}
)
"""Paths whose POST requests run the model. Others are neither limited nor counted."""


class MeteringMiddleware:
    """Gives requests that generate a :class:`~server.access.usage.Meter`, or refuses them.

    Every answer to a limited key says what is left. Whatever becomes of a request, its meter is closed when its answer
    has ended or its client has gone.
    """

    def __init__(self, app: ASGIApp, usage: UsageLedger) -> None:
        self._app = app
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key: ApiKey = scope["state"]["key"]
        if limited(key.limits):
            send = self._with_headers(key, send)
        if scope["method"] != "POST" or scope["path"] not in GENERATING:
            await self._app(scope, receive, send)
            return
        try:
            if not self._usage.prepared(key):
                await run_in_threadpool(self._usage.prepare, key)
            meter = self._usage.open(key)
            await meter.enter()
        except (RateLimited, AdapterError) as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        token = METER.set(meter)
        try:
            await self._app(scope, receive, send)
        finally:
            METER.reset(token)
            meter.close()

    def _with_headers(self, key: ApiKey, send: Send) -> Send:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._usage.limiter.headers(key))
            await send(message)

        return send_with_headers
