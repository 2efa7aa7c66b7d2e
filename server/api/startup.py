"""Startup: open the database, the stores and the engine that the settings ask for, and build the Service from them."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic, time
from typing import Self

from filelock import FileLock, Timeout

from adapters.errors import AdapterError
from adapters.registry.database import Database
from adapters.registry.registry import Registry
from adapters.sources.folder_states import FolderStates
from adapters.sources.sources import Sources
from adapters.sources.watched_folder import WatchedFolder
from adapters.store.remote_store import RemoteStore
from adapters.store.store import AdapterStore
from bases.base import Base
from bases.errors import ConfigError
from bases.model_source import MODULES
from server.access.forbidden import ForbiddenLog
from server.access.history import History
from server.access.key_file import GivenKeys
from server.access.key_store import KeyStore
from server.access.keyring import Keyring
from server.access.limit_table import LimitTable
from server.access.usage import UsageLedger
from server.access.usage_table import UsageTable
from server.api.generation.defaults import SamplingDefaults
from server.api.registry.at_start import NamedAdapters, check_adapters
from server.api.service import Service
from server.api.telemetry.tracing import Tracing, open_tracing
from server.config import Settings
from server.database import open_database
from server.dry_load import DryLoad
from server.engine.engine import Engine
from server.engine.event_router import EventRouter
from server.engine.runner import Runner
from server.engine.sequence import Pooling
from server.engine_hooks import EngineHooks
from server.errors import ServerError
from server.metrics.build import Build
from server.metrics.metrics import Limits, Metrics
from server.parsers.tool_formats import FORMATS
from server.structured.compiler import GrammarCompiler
from server.text.adapter_templates import AdapterTemplates
from server.text.codec import Codec
from server.text.template_environment import TemplateFailure
from server.training_data import DataPreview
from server.training_runs import TrainingRuns
from server.watchdog import Watchdog

GIB = 2**30


@dataclass(frozen=True)
class OpenResources:
    """What is opened before the base loads, so that a bad setting fails in seconds and not after minutes of loading."""

    database: Database
    keyring: Keyring
    remote: RemoteStore | None
    tracing: Tracing | None
    resources: ExitStack
    """Released on exit from the context."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()


def open_resources(settings: Settings) -> OpenResources:
    """Lock the data folder, open the database, and check the adapters, stores and sources that the settings name.

    Raises ConfigError if the data folder is in use or not writable, if the database, a store or a source cannot be
    used, if an adapter's folder does not exist, or if the environment asks for traces that cannot be sent.
    """
    check_adapters(settings)
    with ExitStack() as resources:
        resources.callback(_lock(settings.data_dir / "adapters").release)
        remote = _open_remote(settings)
        _make_sources(settings, limit=0)
        if (tracing := open_tracing()) is not None:
            resources.callback(tracing.close)
        given = GivenKeys(settings.api_key_file, os.environ)
        url = settings.database_url
        database = open_database(settings.data_dir, None if url is None else url.get_secret_value())
        resources.callback(database.close)
        keyring = Keyring(_read_keys(database), given)
        return OpenResources(database, keyring, remote, tracing, resources.pop_all())


def open_service(
    base: Base,
    settings: Settings,
    report: Callable[[str], None] = lambda line: None,
    opened: OpenResources | None = None,
) -> Service:
    """Start the engine and the registry for ``base``, and register the adapters that the settings name.

    ``report`` receives lines about the progress. ``opened`` is the result of :func:`open_resources`, which the service
    then owns and closes; None opens it here. Raises ConfigError if an adapter is rejected, and the errors of
    :func:`open_resources`; stops everything that it started first.
    """
    opened = opened or open_resources(settings)
    with ExitStack() as resources:
        resources.enter_context(opened)
        pooling = choose_pooling(base, settings)
        store = AdapterStore(
            settings.data_dir / "adapters",
            base.layout,
            settings.max_rank,
            remote=opened.remote,
            cache=_bytes(settings.store_cache_gib),
        )
        sources = _make_sources(settings, store.limit)
        codec = _make_codec(base, settings)
        templates = AdapterTemplates(codec, store.chat_template)
        resources.callback(templates.close)
        defaults = _sampling_defaults(base, settings, report)
        grammars = GrammarCompiler(codec.backend, codec.vocabulary, base.eos_token_ids)
        resources.callback(grammars.close)
        preview = DataPreview(base.tokenizer, base.max_model_len)
        resources.callback(preview.close)
        event_router = EventRouter()
        engine = Engine(Runner(base, settings), settings, store.read, event_router.deliver)
        report(engine.runner.kv_size.reason)
        hooks = EngineHooks(base, settings, engine, DryLoad(base, codec, engine, event_router), templates)
        registry = Registry(opened.database, store, hooks, _bytes(settings.store_quota_gib))
        watchdog = Watchdog(engine.watch, settings.step_timeout)
        watchdog.start()
        resources.callback(watchdog.close)  # last, so that it also watches the end
        engine.start()
        resources.callback(engine.stop)
        resources.callback(registry.close)
        opened.keyring.start()
        resources.callback(opened.keyring.close)
        limits = LimitTable(opened.database) if opened.database.shared else None
        usage = UsageLedger(UsageTable(opened.database), monotonic, limits=limits)
        usage.start()
        resources.callback(usage.close)
        if settings.history_days is not None:
            history = History(opened.database, settings.history_days)
            history.start()
            resources.callback(history.close)
        _open_registry(registry, report)
        states = FolderStates(opened.database)
        NamedAdapters(registry, store, states).register(settings, report)
        watched = _watch_folder(registry, states, settings, resources, report)
        metrics = Metrics(
            Build(base.name, base.layout.fingerprint, engine.runner.backend.name),
            Limits(settings.max_device_adapters, int(settings.host_cache_gib * GIB), settings.metrics_adapters),
            engine.stats,
            registry,
            usage.limiter.refused,
        )
        return Service(
            base,
            settings,
            codec,
            templates,
            grammars,
            engine,
            store,
            registry,
            opened.keyring,
            opened.database,
            usage,
            ForbiddenLog(opened.database, monotonic),
            sources,
            watched,
            event_router,
            watchdog,
            metrics,
            defaults,
            pooling,
            TrainingRuns(settings.runs_folder),
            preview,
            opened.tracing,
            resources.pop_all(),
        )


def _make_codec(base: Base, settings: Settings) -> Codec:
    """Return the codec, whose chat template is that of the settings, or the base's."""
    source = None
    if settings.chat_template is not None:
        try:
            source = settings.chat_template.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template: {settings.chat_template} cannot be read: {error}") from error
    codec = Codec(
        base.tokenizer,
        base.model.config.get_text_config().vocab_size,
        base.max_model_len,
        chat_template=source,
        tool_format=FORMATS.get(settings.tool_parser),
    )
    try:
        if source is not None:
            codec.require_template().check()
        if codec.template is not None:
            codec.template.prepare()
    except TemplateFailure as failure:
        raise ConfigError(f"--chat-template: {settings.chat_template} cannot be used: {failure}") from failure
    return codec


def _sampling_defaults(base: Base, settings: Settings, report: Callable[[str], None]) -> SamplingDefaults:
    if settings.generation_config == "off":
        return SamplingDefaults()
    defaults = SamplingDefaults.of(base.model.generation_config)
    if defaults != SamplingDefaults():
        report(defaults.describe())
    return defaults


def choose_pooling(base: Base, settings: Settings) -> Pooling:
    """Return how embeddings are pooled: as the settings say, else as the model's files do, else ``last``.

    In a causal model only the last token has seen the whole text, so models without such files pool it.
    """
    if settings.pooling is not None:
        return settings.pooling
    match base.pooling_modes:
        case () | ("lasttoken",):
            return "last"
        case ("mean",):
            return "mean"
    raise ConfigError(
        f"--pooling: the model's {MODULES} asks for {' and '.join(base.pooling_modes)} pooling, which is not served; "
        "choose last or mean"
    )


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"--data-dir: another server keeps its adapters in {folder}; give this one its own"
        ) from error
    except OSError as error:
        raise ConfigError(f"--data-dir: {folder} cannot be written: {error.strerror or error}") from error
    return lock


def _open_remote(settings: Settings) -> RemoteStore | None:
    try:
        return None if settings.store_url is None else RemoteStore(settings.store_url)
    except ValueError as error:
        raise ConfigError(f"--store-url: {error}") from error


def _make_sources(settings: Settings, limit: int) -> Sources:
    try:
        return Sources(settings.allow_source, limit)
    except ValueError as error:
        raise ConfigError(f"--allow-source: {error}") from error


def _read_keys(database: Database) -> KeyStore:
    try:
        return KeyStore(database)
    except AdapterError as error:
        raise ConfigError(f"the keys cannot be read: {error}") from error


def _open_registry(registry: Registry, report: Callable[[str], None]) -> None:
    """Load the adapters registered in earlier runs."""
    try:
        registry.open(lambda done, total: report(f"checking adapter {done + 1} of {total} on this base"))
    except (AdapterError, ServerError) as error:
        raise ConfigError(f"the registry cannot be opened: {error}") from error
    registry.start()


def _watch_folder(
    registry: Registry, states: FolderStates, settings: Settings, resources: ExitStack, report: Callable[[str], None]
) -> WatchedFolder | None:
    """Scan the watched folder once, then keep watching it on a thread. Return None if the settings name no folder."""
    root = settings.adapter_dir
    if root is None:
        return None
    report(f"looking for adapters in {root}")
    watched = WatchedFolder(root, registry, states.load(str(root)), states.save)
    watched.scan(time())
    stop = Event()
    thread = Thread(target=watched.run, args=(stop,), name="watch", daemon=True)
    thread.start()
    resources.callback(thread.join)
    resources.callback(stop.set)
    return watched


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)
