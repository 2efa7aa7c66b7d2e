"""What names mean to the gateway, in a database that a registry changes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from adapters.registry.catalog import Catalog
from adapters.registry.database import open_sqlite
from adapters.registry.snapshot import Target
from server.ray.names import Names
from tests.api.live import wait_for
from tests.unit.adapters.registries import open_registry, write


def test_names_follow_the_registry(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        registry.register_folder("red", write(tmp_path / "one", 1))
        names = Names(open_sqlite(tmp_path / "registry.sqlite3"))
        first = registry.version("red").content
        assert names.contents(["red"]) == names.contents(["red@1", "red"]) == (first,)
        registry.register_folder("red", write(tmp_path / "two", 2))
        assert names.contents(["red"]) == (first,), "it has not looked yet"
        names.refresh()
        second = registry.version("red").content
        assert names.contents(["red", "red@1"]) == (second, first)
        registry.put_alias("prod", [Target("red", 1, 90.0), Target("red", 2, 10.0)])
        names.refresh()
        assert names.contents(["prod"]) == (first,), "the heaviest"
        users = {names.contents(["prod"], f"user-{number}") for number in range(200)}
        assert users == {(first,), (second,)}
        for number in range(200):
            user = f"user-{number}"
            leases = registry.acquire(["prod"], user)
            assert names.contents(["prod"], user) == (leases[0].version.content,), "as the replica resolves it"
            registry.release(leases)
        assert names.contents(["prod"], "\ud800") in users, "JSON can hold half a surrogate"
        registry.remove_alias("prod")
        registry.remove("red")
        names.refresh()
        assert names.contents(["red", "prod", "red@1", "no name!"]) == ()


def test_an_address_is_its_own_content(tmp_path: Path) -> None:
    with open_registry(tmp_path):
        names = Names(open_sqlite(tmp_path / "registry.sqlite3"))
        assert names.contents(["hf://org/legal", "base"]) == ("hf://org/legal",)


def test_names_answer_while_the_database_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_registry(tmp_path) as registry:
        registry.register_folder("red", write(tmp_path / "one", 1))
        first = registry.version("red").content
        names = Names(open_sqlite(tmp_path / "registry.sqlite3"))
        reading, go_on, load = Event(), Event(), Catalog.load

        def slow(*arguments: Any, **named: Any) -> Any:
            reading.set()
            assert go_on.wait(10)
            return load(*arguments, **named)

        monkeypatch.setattr(Catalog, "load", slow)
        with ThreadPoolExecutor() as threads:
            refreshing = threads.submit(names.refresh)
            assert reading.wait(10)
            try:
                assert threads.submit(names.contents, ["red"]).result(5) == (first,)
            finally:
                go_on.set()
            refreshing.result()


def test_names_see_changes_by_themselves(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        names = Names(open_sqlite(tmp_path / "registry.sqlite3"))
        names.start()
        try:
            registry.register_folder("red", write(tmp_path / "one", 1))
            wait_for(lambda: names.contents(["red"]))
        finally:
            names.close()
