"""Two registries over one PostgreSQL and one shared store."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import select

from adapters.errors import AdapterConflict, AdapterError, AdapterNameError, QuotaExceeded, RegistryUnavailable
from adapters.registry import database
from adapters.registry import registry as module
from adapters.registry.registry import Registry
from adapters.registry.snapshot import Target
from adapters.store.remote_store import RemoteStore
from tests.postgres import Postgres, postgres
from tests.unit.adapters.registries import ids_in, open_registry, stored, write

SOON = 2.0
"""Seconds within which a change made through one server is served by the other."""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture
def url(server: Postgres) -> str:
    return server.fresh()


@pytest.fixture
def remote(tmp_path: Path) -> RemoteStore:
    return RemoteStore(f"file://{tmp_path}/shared")


@pytest.fixture
def pair(tmp_path: Path, url: str, remote: RemoteStore) -> Iterator[tuple[Registry, Registry]]:
    with ExitStack() as stack:
        yield (
            stack.enter_context(open_registry(tmp_path / "one", url=url, remote=remote)),
            stack.enter_context(open_registry(tmp_path / "two", url=url, remote=remote)),
        )


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"seed{seed}", seed) for seed in range(10)]


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON} s"
        time.sleep(0.01)


def test_change_is_seen_by_other_servers(pair: tuple[Registry, Registry], folders: list[Path]) -> None:
    one, two = pair
    version = one.register_folder("legal", folders[0]).version
    soon(lambda: two.knows("legal"))
    lease = two.acquire(["legal"])
    assert lease[0].version == version
    assert two._store.read(version.content).spec.id == version.content
    two.register_folder("legal", folders[1])
    soon(lambda: one.version("legal").number == 2)
    one.activate("legal", 1)
    soon(lambda: two.version("legal").number == 1)
    two.put_alias("prod", [Target("legal", 2, 1)])
    soon(lambda: one.knows("prod"))
    one.remove_alias("prod")
    one.remove("legal")
    soon(lambda: not two.knows("legal"))
    # Content that a server is using stays readable there.
    assert two._store.read(version.content).spec.id == version.content
    two.release(lease)


def test_shared_bytes_are_deleted_after_grace_and_copies_at_once(
    pair: tuple[Registry, Registry],
    folders: list[Path],
    tmp_path: Path,
    remote: RemoteStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = pair
    content = one.register_folder("legal", folders[0]).version.content
    soon(lambda: two.knows("legal"))
    two._store.read(content)
    one.remove("legal")
    soon(lambda: not stored(tmp_path / "one") and not stored(tmp_path / "two"))
    assert list(ids_in(remote)) == [content]
    monkeypatch.setattr(module, "GRACE_SECONDS", 0)
    one._delete_unreferenced()
    assert list(ids_in(remote)) == []
    assert one.register_folder("legal", folders[0]).version.number == 2


def test_grace_period_begins_with_the_removal(
    pair: tuple[Registry, Registry], folders: list[Path], remote: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server may be using content that was registered long ago and has just lost its name."""
    one, _ = pair
    content = one.register_folder("legal", folders[0]).version.content
    monkeypatch.setattr(module, "GRACE_SECONDS", 1)
    time.sleep(1.1)
    one.remove("legal")
    one._delete_unreferenced()
    assert list(ids_in(remote)) == [content]
    time.sleep(1.1)
    one._delete_unreferenced()
    assert list(ids_in(remote)) == []


def test_only_one_of_two_servers_deletes(pair: tuple[Registry, Registry], folders: list[Path]) -> None:
    """A second deletion that ends after the first would also delete the bytes of a new registration."""
    one, two = pair
    one.register_folder("legal", folders[0])
    one.remove("legal")
    [(content, touched)] = one._contents.unreferenced(0)
    claim = one._contents.begin_delete(content, touched)
    assert claim is not None
    assert two._contents.begin_delete(content, touched) is None
    # If the first has died, another takes over; should it still live, its end_delete does nothing.
    later = two._contents.begin_delete(content, claim)
    assert later is not None
    one._contents.end_delete(content, claim)
    assert one._contents.unreferenced(0) == [(content, later)]
    two._contents.end_delete(content, later)
    assert one._contents.unreferenced(0) == []


def test_servers_use_the_databases_clock(
    pair: tuple[Registry, Registry], folders: list[Path], remote: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    content = one.register_folder("legal", folders[0]).version.content
    one.remove("legal")
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3600 * 10**9)
    two._delete_unreferenced()
    assert list(ids_in(remote)) == [content]


def test_server_that_dies_during_a_change_does_not_block_others(
    pair: tuple[Registry, Registry], folders: list[Path], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(database, "IDLE_SECONDS", 1)
    stuck = database.open_postgres(url)
    with pytest.raises(RegistryUnavailable), stuck.writing() as (connection, _):  # noqa: PT012
        assert pair[0].register_folder("legal", folders[0]).new
        connection.execute(select(1))
    stuck.close()


def test_restored_database_is_loaded_again(pair: tuple[Registry, Registry], folders: list[Path], url: str) -> None:
    """As after the loss of a primary whose last changes had not reached the replica."""
    one, two = pair
    one.register_folder("kept", folders[0])
    revision = one._revision
    one.register_folder("lost", folders[1])
    soon(lambda: two.knows("lost"))
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM versions WHERE name = 'lost'")
        connection.execute("DELETE FROM names WHERE name = 'lost'")
        connection.execute("UPDATE registry SET revision = %s", (revision,))
    for registry in pair:
        soon(lambda registry=registry: not registry.knows("lost"))
        assert registry.knows("kept")


def test_read_only_database_is_unavailable(pair: tuple[Registry, Registry], folders: list[Path], url: str) -> None:
    """Like a replica that was not promoted yet."""
    one, _ = pair
    one.register_folder("legal", folders[0])
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{connection.info.dbname}" SET default_transaction_read_only = on')
    one._contents._database.close()
    with pytest.raises(RegistryUnavailable):
        one.register_folder("german", folders[1])
    assert one.acquire(["legal"])


def test_one_of_several_concurrent_changes_wins(pair: tuple[Registry, Registry], folders: list[Path]) -> None:
    one, two = pair
    one.register_folder("legal", folders[0])
    one.register_folder("legal", folders[1])
    soon(lambda: two.knows("legal@2"))
    seen = one.entry("legal").revision

    def outcome(change: Callable[[], object]) -> str:
        try:
            change()
        except AdapterError as error:
            return type(error).__name__
        return "won"

    def race(*changes: Callable[[], object]) -> list[str]:
        with ThreadPoolExecutor(len(changes)) as threads:
            return sorted(threads.map(outcome, changes))

    assert race(lambda: one.activate("legal", 1, expected=seen), lambda: two.activate("legal", 2, expected=seen)) == [
        "RevisionMismatch",
        "won",
    ]
    assert race(lambda: one.remove("legal"), lambda: two.remove("legal")) == ["UnknownAdapter", "won"]
    assert race(lambda: one.register_folder("X", folders[0]), lambda: two.register_folder("x", folders[1])) == [
        "AdapterNameError",
        "won",
    ]


def test_concurrent_versions_all_get_numbers(pair: tuple[Registry, Registry], folders: list[Path]) -> None:
    with ThreadPoolExecutor(10) as threads:
        numbers = [
            done.version.number
            for done in threads.map(lambda i: pair[i % 2].register_folder("legal", folders[i]), range(10))
        ]
    assert sorted(numbers) == list(range(1, 11))
    for registry in pair:
        registry.refresh()
        assert list(registry.entry("legal").versions) == list(range(1, 11))
    assert pair[0].entry("legal") == pair[1].entry("legal")


def test_quota_is_shared(tmp_path: Path, url: str, remote: RemoteStore, folders: list[Path]) -> None:
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    with ExitStack() as stack:
        pair = [
            stack.enter_context(open_registry(tmp_path / name, 4 * size + 100, url=url, remote=remote))
            for name in ("one", "two")
        ]

        def register(index: int) -> bool:
            try:
                pair[index % 2].register_folder(f"n{index}", folders[index])
            except QuotaExceeded:
                return False
            return True

        with ThreadPoolExecutor(10) as threads:
            assert sum(threads.map(register, range(10))) == 4


def test_lookups_work_while_the_database_is_down(
    server: Postgres, pair: tuple[Registry, Registry], folders: list[Path], tmp_path: Path
) -> None:
    one, two = pair
    content = one.register_folder("legal", folders[0]).version.content
    soon(lambda: two.knows("legal"))
    server.stop()
    try:
        for registry in pair:
            lease = registry.acquire(["legal"])
            assert registry._store.read(content).spec.id == content
            registry.release(lease)
            for change in (
                lambda registry=registry: registry.register_folder("german", folders[1]),
                lambda registry=registry: registry.remove("legal"),
            ):
                with pytest.raises(RegistryUnavailable):
                    change()
        soon(lambda: not one.available)
    finally:
        server.start()
    soon(lambda: one.available and two.available)
    assert one.register_folder("german", folders[1]).new
    soon(lambda: two.knows("german"))
    assert [entry.name for entry in two.entries()] == ["german", "legal"]


def test_state_survives_a_restart(tmp_path: Path, url: str, remote: RemoteStore, folders: list[Path]) -> None:
    with open_registry(tmp_path / "one", url=url, remote=remote) as registry:
        version = registry.register_folder("legal", folders[0]).version
    # As on another machine, with only the database and the shared store.
    with open_registry(tmp_path / "another", url=url, remote=remote) as registry:
        assert registry.version("legal") == version
        assert registry._store.read(version.content).spec.id == version.content


def test_errors_equal_those_of_sqlite(pair: tuple[Registry, Registry], folders: list[Path]) -> None:
    one, two = pair
    one.register_folder("legal", folders[0])
    one.put_alias("prod", [Target("legal", 1, 1)])
    with pytest.raises(AdapterConflict, match="alias `prod`"):
        two.remove("legal")
    with pytest.raises(AdapterConflict, match="active version"):
        two.remove("legal@1")
    with pytest.raises(AdapterNameError, match="upper and lower case"):
        two.register_folder("LEGAL", folders[0])
