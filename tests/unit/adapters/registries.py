"""Registries over tiny adapters, for tests of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from adapters.format.spec import BaseLayout
from adapters.registry.database import open_postgres, open_sqlite
from adapters.registry.hooks import RegistryHooks
from adapters.registry.registry import Registry
from adapters.store.remote_store import RemoteStore
from adapters.store.store import AdapterStore
from tests.adapter_folders import LAYERS, layout_of, write_adapter
from tests.tiny import tiny_model

MAX_RANK = 16


@cache
def tiny_layout() -> BaseLayout:
    return layout_of(tiny_model("llama"))


def write(folder: Path, seed: int, rank: int = 1) -> Path:
    """A small adapter whose content depends on the seed."""
    return write_adapter(folder, tiny_layout(), seed=seed, rank=rank, layers=LAYERS[:1])


@contextmanager
def open_registry(
    root: Path, quota: int | None = None, *, url: str | None = None, remote: RemoteStore | None = None, **ties: Any
) -> Iterator[Registry]:
    """A registry under ``root`` that has taken in what is there, and runs; ``url`` is of a PostgreSQL."""
    store = AdapterStore(root / "adapters", tiny_layout(), MAX_RANK, remote=remote)
    database = open_sqlite(root / "registry.sqlite3") if url is None else open_postgres(url)
    registry = Registry(database, store, RegistryHooks(**{"base": tiny_layout().fingerprint, **ties}), quota)
    try:
        registry.open()
        registry.start()
        yield registry
    finally:
        registry.close()
        database.close()


def stored(root: Path) -> set[str]:
    """What is on disk."""
    return {path.name for path in (root / "adapters").iterdir()}
