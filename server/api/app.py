"""The ASGI application around a service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.api import adapters, completions, health, models
from server.api.errors import install
from server.api.middleware import BodyLimit, Door
from server.api.service import Service


def create_app(service: Service) -> FastAPI:
    """The application. Its lifespan runs the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.switchboard.bind()
        service.engine.start()
        try:
            yield
        finally:
            service.switchboard.draining = True
            await asyncio.to_thread(service.engine.stop)
            service.lock.release()

    app = FastAPI(
        title="manylora",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    for routes in (completions, models, adapters, health):
        app.include_router(routes.router)
    install(app)
    app.add_middleware(BodyLimit, limit=int(service.settings.max_body_mib * 2**20))
    app.add_middleware(Door, metrics=service.metrics)
    return app
