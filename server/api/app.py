"""The ASGI application around a service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.api import adapters, aliases, completions, health, models, tokenize, vllm
from server.api.errors import install
from server.api.middleware import BodyLimit, Door
from server.api.service import Service

AROUND_WEIGHTS = 16 << 20
"""Bytes that an upload may have besides an adapter's weights."""


def create_app(service: Service) -> FastAPI:
    """The application. It closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.switchboard.bind()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="manylora",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    for routes in (completions, tokenize, models, adapters, aliases, vllm, health):
        app.include_router(routes.router)
    install(app)
    app.add_middleware(
        BodyLimit, limit=int(service.settings.max_body_mib * 2**20), upload_limit=service.store.limit + AROUND_WEIGHTS
    )
    app.add_middleware(Door, metrics=service.metrics)
    return app
