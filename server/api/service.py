"""Service: what the routes share. A base with its engine, its adapters and its open requests."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from time import time
from typing import Annotated, Self, cast

from fastapi import Depends, Request
from filelock import FileLock, Timeout
from sqlalchemy.exc import ArgumentError, DBAPIError

from adapters.errors import AdapterError
from adapters.registry.database import Database, open_postgres, open_sqlite
from adapters.registry.names import check_name
from adapters.registry.registry import Registry
from adapters.registry.schema import NewerSchema
from adapters.sources.folder_states import FolderStates
from adapters.sources.sources import Sources
from adapters.sources.watched_folder import WatchedFolder
from adapters.store.remote_store import RemoteStore
from adapters.store.store import AdapterStore
from bases.base import Base
from bases.errors import ConfigError
from server.api.registry.intake import Intake
from server.config import Settings
from server.dry_load import DryLoad
from server.engine.engine import Engine
from server.engine.event_router import EventRouter
from server.engine.runner import Runner
from server.engine_hooks import EngineHooks
from server.errors import ServerError
from server.metrics import Metrics
from server.text import Codec

GIB = 2**30


@dataclass(frozen=True)
class Service:
    """Everything a request may need. One per Base."""

    base: Base
    settings: Settings
    codec: Codec
    engine: Engine
    store: AdapterStore
    registry: Registry
    sources: Sources
    watch: WatchedFolder | None
    event_router: EventRouter
    metrics: Metrics
    closing: ExitStack
    """What is to be let go at the end."""
    intake: Intake = field(default_factory=Intake)
    created: int = field(default_factory=lambda: int(time()))
    """Unix time, seconds."""

    @property
    def fingerprint(self) -> str:
        """The base's, short, as OpenAI's ``system_fingerprint``."""
        return f"fp_{self.base.layout.fingerprint[:12]}"

    @property
    def under_way(self) -> int:
        """Requests, uploads and registrations that have begun and not ended: what a drain waits for."""
        return len(self.event_router) + self.intake.under_way

    def close(self) -> None:
        """End the engine and let everything go."""
        self.event_router.draining = True
        self.closing.close()


@dataclass(frozen=True)
class Beginning:
    """What a server needs beside its base, opened before the base is: that may take minutes, and then be refused."""

    database: Database
    remote: RemoteStore | None
    closing: ExitStack
    """What is to be let go at the end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()


def begin(settings: Settings) -> Beginning:
    """Take the data folder, open the database, and look at what else the settings name.

    Raises ConfigError for a data folder that is in use or cannot be written, for a database, a store or a source that
    cannot be used, and for adapters that are not there.
    """
    _check_adapters(settings)
    with ExitStack() as closing:
        closing.callback(_lock(settings.data / "adapters").release)
        remote = _remote(settings)
        _sources(settings, limit=0)
        database = _database(settings)
        closing.callback(database.close)
        return Beginning(database, remote, closing.pop_all())


def open_service(
    base: Base,
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
    beginning: Beginning | None = None,
) -> Service:
    """Build engine and registry around ``base``, start them, and register what the settings name.

    ``beginning``: what :func:`begin` opened, which the service closes at its end; None to do that here. Raises
    ConfigError for an adapter that is refused, and for what :func:`begin` refuses; then nothing runs any more.
    """
    beginning = beginning or begin(settings)
    with ExitStack() as closing:
        closing.enter_context(beginning)
        database = beginning.database
        store = AdapterStore(
            settings.data / "adapters",
            base.layout,
            settings.max_rank,
            remote=beginning.remote,
            cache=_bytes(settings.store_cache_gib),
        )
        sources = _sources(settings, store.limit)
        codec = Codec(base.tokenizer, base.model.config.get_text_config().vocab_size, base.max_model_len)
        event_router = EventRouter()
        engine = Engine(Runner(base, settings), settings, store.read, event_router.deliver)
        say(engine.runner.room.reason)
        hooks = EngineHooks(base, settings, engine, DryLoad(base, codec, engine, event_router))
        registry = Registry(database, store, hooks, _bytes(settings.store_quota_gib))
        engine.start()
        closing.callback(engine.stop)
        closing.callback(registry.close)
        _fill(registry, settings, say)
        watch = _watch(registry, FolderStates(database), settings, closing, say)
        metrics = Metrics(base.name, settings.max_device_adapters, engine.stats, registry)
        return Service(
            base, settings, codec, engine, store, registry, sources, watch, event_router, metrics, closing.pop_all()
        )


def _check_adapters(settings: Settings) -> None:
    for name, path in settings.adapter.items():
        try:
            check_name(name)
        except AdapterError as error:
            raise ConfigError(f"--adapter: {error}") from error
        if not path.is_dir():
            raise ConfigError(f"--adapter: {name}={path}: there is no such folder")


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


def _remote(settings: Settings) -> RemoteStore | None:
    try:
        return None if settings.store_url is None else RemoteStore(settings.store_url)
    except ValueError as error:
        raise ConfigError(f"--store-url: {error}") from error


def _sources(settings: Settings, limit: int) -> Sources:
    try:
        return Sources(settings.allow_source, limit)
    except ValueError as error:
        raise ConfigError(f"--allow-source: {error}") from error


def _database(settings: Settings) -> Database:
    url = settings.database_url
    option = "--data" if url is None else "--database-url"
    try:
        return open_sqlite(settings.data / "registry.sqlite3") if url is None else open_postgres(url.get_secret_value())
    except NewerSchema as error:
        raise ConfigError(f"{option}: the registry was made by a newer manylora (schema {error})") from error
    except DBAPIError as error:
        raise ConfigError(f"{option}: {_first_line(error.orig)}") from error
    except (AdapterError, ArgumentError, ModuleNotFoundError) as error:
        cause = error.__cause__
        reason = f" ({_first_line(cause.orig)})" if isinstance(cause, DBAPIError) else ""
        raise ConfigError(f"{option}: {error}{reason}") from error


def _first_line(error: BaseException | None) -> str:
    return str(error).partition("\n")[0]


def _fill(registry: Registry, settings: Settings, say: Callable[[str], None]) -> None:
    """Take in what was registered before, then what the settings name."""
    try:
        registry.open(lambda done, total: say(f"checking adapter {done + 1} of {total} on this base"))
    except (AdapterError, ServerError) as error:
        raise ConfigError(f"the registry cannot be opened: {error}") from error
    registry.start()
    for name, path in settings.adapter.items():
        say(f"registering adapter {name} from {path}")
        try:
            registry.register_folder(name, path)
        except (AdapterError, ServerError) as error:
            raise ConfigError(f"--adapter: {name}={path}: {error}") from error


def _watch(
    registry: Registry, seen: FolderStates, settings: Settings, closing: ExitStack, say: Callable[[str], None]
) -> WatchedFolder | None:
    """The watched folder, looked into once, then on a thread of its own."""
    root = settings.adapter_dir
    if root is None:
        return None
    say(f"looking for adapters in {root}")
    watch = WatchedFolder(root, registry, seen.under(str(root)), seen.put)
    watch.scan(time())
    stop = Event()
    thread = Thread(target=watch.run, args=(stop,), name="watch", daemon=True)
    thread.start()
    closing.callback(thread.join)
    closing.callback(stop.set)
    return watch


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)


async def _service(request: Request) -> Service:
    return cast("Service", request.app.state.service)


Served = Annotated[Service, Depends(_service)]
"""A route's way to the service."""
