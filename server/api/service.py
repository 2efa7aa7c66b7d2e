"""Service: what the routes share. A base with its engine, its adapters and its open requests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Annotated, cast

from fastapi import Depends, Request
from filelock import FileLock, Timeout

from adapters.errors import AdapterError
from adapters.registry import Registry
from adapters.store import AdapterStore
from server.api.switchboard import Switchboard
from server.base import Base
from server.config import Settings
from server.engine import Engine
from server.errors import ConfigError
from server.metrics import Metrics
from server.text import Codec


@dataclass(frozen=True)
class Service:
    """Everything a request may need. One per Base."""

    base: Base
    settings: Settings
    codec: Codec
    engine: Engine
    registry: Registry
    switchboard: Switchboard
    metrics: Metrics
    lock: FileLock
    """Held on the adapters' folder, which belongs to one process."""
    created: int = field(default_factory=lambda: int(time()))
    """Unix time, seconds."""

    @property
    def fingerprint(self) -> str:
        """The base's, short, as OpenAI's ``system_fingerprint``."""
        return f"fp_{self.base.layout.fingerprint[:12]}"


def open_service(base: Base, settings: Settings) -> Service:
    """Build engine and registry around ``base`` and register ``settings.adapter``. Nothing runs yet.

    Raises ConfigError for an adapter that is refused, and for a data folder that is in use.
    """
    folder = settings.data / "adapters"
    lock = _lock(folder)
    store = AdapterStore(folder, base.layout, settings.max_rank)
    # Names live in memory, so what an earlier run left on disk has none.
    store.sweep(frozenset())
    switchboard = Switchboard()
    engine = Engine(base, settings, store.read, switchboard.deliver)
    registry = Registry(store, reserved=frozenset({base.name}), on_unused=engine.forget)
    _register(registry, settings.adapter)
    codec = Codec(base.tokenizer, base.model.config.get_text_config().vocab_size, base.max_model_len)
    metrics = Metrics(base.name, settings.max_device_adapters, engine.stats, registry.list)
    return Service(base, settings, codec, engine, registry, switchboard, metrics, lock)


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"--data: another server keeps its adapters in {folder}; give this one its own") from error
    except OSError as error:
        raise ConfigError(f"--data: {folder} cannot be written: {error.strerror or error}") from error
    return lock


def _register(registry: Registry, adapters: Mapping[str, Path]) -> None:
    for name, path in adapters.items():
        try:
            registry.register(name, path)
        except AdapterError as error:
            raise ConfigError(f"--adapter: {name}={path}: {error}") from error


async def _service(request: Request) -> Service:
    return cast("Service", request.app.state.service)


Served = Annotated[Service, Depends(_service)]
"""A route's way to the service."""
