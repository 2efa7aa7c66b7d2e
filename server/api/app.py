"""Create the ASGI application for a service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from adapters.format.archive import max_bytes
from server.api.http import errors, openapi
from server.api.http.cors import CrossOriginMiddleware
from server.api.http.ignored_fields import IgnoredFieldsMiddleware
from server.api.http.middleware import AccessLogMiddleware, BodyLimitMiddleware, ErrorMiddleware
from server.api.http.paths import PathMiddleware
from server.api.routes import (
    adapters,
    aliases,
    completions,
    embeddings,
    health,
    index,
    messages,
    models,
    responses,
    score,
    tokenize,
    vllm,
)
from server.api.service import Service

UPLOAD_MARGIN = 1 << 20
"""Bytes above the largest upload at which the middleware cuts off. The upload route itself rejects it earlier."""


def create_app(service: Service) -> FastAPI:
    """Return the application. It closes the service on shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.event_router.bind()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    # FastAPI's own documentation pages load scripts from the internet, and stay blank without it.
    app = FastAPIOffline(
        redoc_url=None,
        title="manylora",
        version=version("manylora"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    generating = (completions, responses, messages, embeddings, score, tokenize)
    for routes in (*generating, models, adapters, aliases, vllm, health, index):
        app.include_router(routes.router)
    errors.install_handlers(app)
    openapi.install_document(app)
    app.add_middleware(
        BodyLimitMiddleware,
        limit=int(service.settings.max_body_mib * 2**20),
        upload_limit=max_bytes(service.store.limit) + UPLOAD_MARGIN,
    )
    # The last middleware added is the outermost: responses of all kinds get a request id and CORS headers.
    app.add_middleware(PathMiddleware)
    app.add_middleware(ErrorMiddleware)
    if service.settings.lenient:
        app.add_middleware(IgnoredFieldsMiddleware)
    if origins := service.settings.cors_origin:
        app.add_middleware(CrossOriginMiddleware, origins=origins)
    app.add_middleware(AccessLogMiddleware, metrics=service.metrics)
    return app
