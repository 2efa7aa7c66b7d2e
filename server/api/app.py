"""Create the ASGI application for a service."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from adapters.format.archive import max_bytes
from server.api.access.auditing import AuditMiddleware
from server.api.access.authentication import AuthenticationMiddleware
from server.api.access.hosts import HostMiddleware
from server.api.access.metering import MeteringMiddleware
from server.api.http import errors, openapi
from server.api.http.body_limits import BodyLimitMiddleware
from server.api.http.cors import CrossOriginMiddleware, CrossSiteMiddleware
from server.api.http.ignored_fields import IgnoredFieldsMiddleware
from server.api.http.middleware import AccessLogMiddleware, ErrorMiddleware
from server.api.http.paths import PathMiddleware
from server.api.page import NOT_BUILT, Page
from server.api.protocol.refusal import RefusalMiddleware
from server.api.routes import (
    adapters,
    aliases,
    audit,
    completions,
    embeddings,
    health,
    index,
    keys,
    messages,
    models,
    responses,
    score,
    tokenize,
    usage,
    vllm,
    whoami,
)
from server.api.routes.training import data as training_data
from server.api.routes.training import runs as training_runs
from server.api.service import Service
from server.api.telemetry.request_log import RequestLog
from server.listener import is_local_name
from server.training_data import MAX_BYTES as MAX_DATA_BYTES

log = logging.getLogger(__name__)

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
        telemetry={"tracing": False, "metrics": False, "logs": False},  # FastAPI's own would record errors' texts
        title="manylora",
        version=version("manylora"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.page = page = None if service.settings.no_page else Page()
    if page is not None and not page.built:
        log.warning("%s", NOT_BUILT)
    generating = (completions, responses, messages, embeddings, score, tokenize)
    training = (training_runs, training_data)
    for routes in (*generating, models, adapters, aliases, keys, whoami, usage, audit, *training, vllm, health, index):
        app.include_router(routes.router)
    errors.install_handlers(app)
    openapi.install_document(app)
    app.add_middleware(
        BodyLimitMiddleware,
        limit=int(service.settings.max_body_mib * 2**20),
        upload_limits={
            "/v1/adapters": max_bytes(service.store.limit) + UPLOAD_MARGIN,
            "/v1/training/data": MAX_DATA_BYTES + UPLOAD_MARGIN,
        },
        seconds=service.settings.request_timeout_seconds,
    )
    app.add_middleware(RefusalMiddleware)
    app.add_middleware(CrossSiteMiddleware)
    # The last middleware added is the outermost: responses of all kinds get a request id and CORS headers.
    app.add_middleware(MeteringMiddleware, usage=service.usage)
    app.add_middleware(AuditMiddleware, forbidden=service.forbidden)
    app.add_middleware(
        AuthenticationMiddleware,
        keyring=service.keyring,
        forbidden=service.forbidden,
        is_open=lambda scope: page is not None and page.wanted(scope),
    )
    if is_local_name(service.settings.host):
        app.add_middleware(HostMiddleware, keyring=service.keyring, names=service.settings.allowed_host)
    app.add_middleware(PathMiddleware)
    app.add_middleware(ErrorMiddleware)
    if service.settings.lenient:
        app.add_middleware(IgnoredFieldsMiddleware)
    if origins := service.settings.cors_origin:
        app.add_middleware(CrossOriginMiddleware, origins=origins)
    app.add_middleware(
        AccessLogMiddleware,
        metrics=service.metrics,
        request_log=RequestLog(service.codec.text_of if service.settings.log_prompts else None),
        tracing=service.tracing,
    )
    return app
