"""Registries of tiny adapters."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout
from adapters.registry.database import open_postgres, open_sqlite
from adapters.registry.hooks import RegistryHooks
from adapters.registry.registry import Registry
from adapters.registry.snapshot import Version
from adapters.store.remote_store import RemoteStore
from adapters.store.store import AdapterStore
from tests.adapter_folders import LAYERS, layout_of, write_adapter
from tests.tiny import tiny_model

MAX_RANK = 16


@cache
def tiny_layout() -> BaseLayout:
    return layout_of(tiny_model("llama"))


def write(folder: Path, seed: int, rank: int = 1) -> Path:
    """Write a small adapter whose content depends on the seed."""
    return write_adapter(folder, tiny_layout(), seed=seed, rank=rank, layers=LAYERS[:1])


class FakeHooks(RegistryHooks):
    """Hooks that call functions of a test."""

    def __init__(
        self,
        base: str,
        *,
        probe: Callable[[AdapterSpec, bool], Mapping[str, Any]] = lambda spec, keep: {},
        fits: Callable[[Collection[int]], bool] = lambda ranks: True,
        on_pins: Callable[[Sequence[Version]], None] = lambda versions: None,
        on_unused: Callable[[AdapterId], None] = lambda content: None,
        **facts: Any,
    ) -> None:
        super().__init__(base, **facts)
        self._probe, self._fits, self._on_pins, self._on_unused = probe, fits, on_pins, on_unused

    def dry_load(self, spec: AdapterSpec, keep: bool) -> Mapping[str, Any]:
        return self._probe(spec, keep)

    def can_pin(self, ranks: Collection[int]) -> bool:
        return self._fits(ranks)

    def pins_changed(self, versions: Sequence[Version]) -> None:
        self._on_pins(versions)

    def content_unused(self, content: AdapterId) -> None:
        self._on_unused(content)


@contextmanager
def open_registry(
    root: Path, quota: int | None = None, *, url: str | None = None, remote: RemoteStore | None = None, **hooks: Any
) -> Iterator[Registry]:
    """Open and start the registry under ``root``; ``url``: of a PostgreSQL database."""
    store = AdapterStore(root / "adapters", tiny_layout(), MAX_RANK, remote=remote)
    database = open_sqlite(root / "registry.sqlite3") if url is None else open_postgres(url)
    registry = Registry(database, store, FakeHooks(**{"base": tiny_layout().fingerprint, **hooks}), quota)
    try:
        registry.open()
        registry.start()
        yield registry
    finally:
        registry.close()
        database.close()


def stored(root: Path) -> set[str]:
    """Return the names of the stored contents."""
    return {path.name for path in (root / "adapters").iterdir()}


def ids_in(remote: RemoteStore) -> Iterator[AdapterId]:
    """Yield every content in the remote, partial uploads included. Raises RegistryUnavailable."""
    try:
        with remote._translate_errors():
            paths = remote._files.ls(remote._root, detail=False, refresh=True)
    except FileNotFoundError:
        # An empty store has no folder.
        remote._check_bucket()
        return
    for path in paths:
        name = path.rstrip("/").rpartition("/")[2]
        if re.fullmatch(r"[0-9a-f]{64}", name):
            yield AdapterId(name)
