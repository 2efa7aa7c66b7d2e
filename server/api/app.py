"""The ASGI application around a service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.api import adapters, aliases, completions, document, errors, health, index, models, tokenize, vllm
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

    # The scripts of FastAPI's own pages come from elsewhere, which leaves them blank where there is no internet.
    app = FastAPIOffline(
        redoc_url=None,
        title="manylora",
        version=version("manylora"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    for routes in (completions, tokenize, models, adapters, aliases, vllm, health, index):
        app.include_router(routes.router)
    errors.install(app)
    document.install(app)
    app.add_middleware(
        BodyLimit, limit=int(service.settings.max_body_mib * 2**20), upload_limit=service.store.limit + AROUND_WEIGHTS
    )
    app.add_middleware(Door, metrics=service.metrics)
    return app
