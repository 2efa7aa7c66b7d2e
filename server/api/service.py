"""The Service: the objects that all routes share."""

from asyncio import Semaphore
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Event
from time import time
from typing import Annotated, cast

from fastapi import Depends, Request

from adapters.registry.database import Database
from adapters.registry.registry import Registry
from adapters.sources.sources import Sources
from adapters.sources.watched_folder import WatchedFolder
from adapters.store.store import AdapterStore
from bases.base import Base
from server.access.forbidden import ForbiddenLog
from server.access.key import ApiKey
from server.access.keyring import Keyring
from server.access.usage import UsageLedger
from server.access.view import RegistryView
from server.api.generation.defaults import SamplingDefaults
from server.api.registry.fetches import Fetches
from server.api.registry.limits import RegistrationLimits
from server.api.telemetry.tracing import Tracing
from server.config import Settings
from server.engine.engine import Engine
from server.engine.event_router import EventRouter
from server.engine.sequence import Pooling
from server.metrics.metrics import Metrics
from server.structured.compiler import GrammarCompiler
from server.text.adapter_templates import AdapterTemplates
from server.text.codec import Codec
from server.training_data import MAX_RUNNING, MAX_UPLOADS, DataPreview
from server.training_runs import TrainingRuns
from server.watchdog import Watchdog


@dataclass(frozen=True)
class Service:
    """One base model with its engine, its adapters and its metrics. Made by :func:`server.api.startup.open_service`."""

    base: Base
    settings: Settings
    codec: Codec
    templates: AdapterTemplates
    grammars: GrammarCompiler
    engine: Engine
    store: AdapterStore
    registry: Registry
    keyring: Keyring
    database: Database
    usage: UsageLedger
    forbidden: ForbiddenLog
    sources: Sources
    watched_folder: WatchedFolder | None
    event_router: EventRouter
    watchdog: Watchdog
    metrics: Metrics
    sampling_defaults: SamplingDefaults
    pooling: Pooling
    """How embeddings are pooled if a request does not say."""
    training_runs: TrainingRuns
    data_preview: DataPreview
    tracing: Tracing | None
    """Sends traces, if the environment asks for them."""
    resources: ExitStack
    """Released by :meth:`close`."""
    registration_limits: RegistrationLimits = field(default_factory=RegistrationLimits)
    data_uploads: Semaphore = field(default_factory=lambda: Semaphore(MAX_UPLOADS))
    """Held while a file of training data is received and examined."""
    data_previews: Semaphore = field(default_factory=lambda: Semaphore(MAX_RUNNING))
    """Held while a file of training data is examined."""
    fetches: Fetches = field(default_factory=Fetches)
    leaving: Event = field(default_factory=Event)
    """Set once the server is to end. ``/readyz`` says so, even while requests are still taken."""
    created: int = field(default_factory=lambda: int(time()))
    """Unix time in seconds."""

    @property
    def fingerprint(self) -> str:
        """Shortened fingerprint of the base, for OpenAI's ``system_fingerprint`` field."""
        return f"fp_{self.base.layout.fingerprint[:12]}"

    @property
    def in_progress(self) -> int:
        """Number of unfinished requests, uploads and registrations. A draining server waits until it is 0."""
        return len(self.event_router) + self.registration_limits.in_progress

    def view(self, key: ApiKey) -> RegistryView:
        """Return the registry as a key sees it. Routes use it in place of the registry itself."""
        return RegistryView(self.registry, key)

    def close(self) -> None:
        """Stop the engine and release all resources."""
        self.event_router.draining = True
        self.resources.close()


async def _service(request: Request) -> Service:
    return cast("Service", request.app.state.service)


ServiceDep = Annotated[Service, Depends(_service)]
"""Declare a route parameter with this type to get the service."""
