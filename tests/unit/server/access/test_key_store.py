"""Keys in the database: what changes of them mean, at once here and soon on other servers."""

import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from adapters.errors import RegistryUnavailable
from adapters.registry.database import Database, open_postgres, open_sqlite
from adapters.registry.schema import api_keys
from server.access.credentials import digest_of
from server.access.history import History
from server.access.key import KeyLimits
from server.access.key_file import GivenKeys
from server.access.key_spec import KeySpec, Limits
from server.access.key_store import KeyStore
from server.access.keyring import Keyring
from server.errors import KeyConflict, UnknownKey
from tests.postgres import Postgres, postgres

SOON = 2.0
"""Seconds within which another server notices a change."""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Database, Database]]:
    """Two connections to one database, as of two servers, or of a server and the command line."""
    url = request.getfixturevalue("server").fresh() if request.param == "postgres" else None
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(closing(open_sqlite(tmp_path / "keys.sqlite3") if url is None else open_postgres(url)))
            for _ in range(2)
        )
        yield one, two


@pytest.fixture
def keyring(tmp_path: Path) -> Iterator[Keyring]:
    with closing(open_sqlite(tmp_path / "keys.sqlite3")) as database:
        yield keyring_of(database)


NONE = GivenKeys(None, {})


def keyring_of(database: Database) -> Keyring:
    return Keyring(KeyStore(database), NONE)


def expiring(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_a_key_is_kept_as_it_was_asked_for(databases: tuple[Database, Database]) -> None:
    one, two = databases
    spec = KeySpec(
        name="acme",
        scopes=["infer", "adapters"],
        adapters=["acme/*", "prod"],
        limits=Limits(requests_per_minute=60, tokens_per_month=10**12),
        weight=2.5,
        expires=datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    stored, secret = KeyStore(one).add(spec)
    plain, _ = KeyStore(one).add(KeySpec(name="plain"))
    none, _ = KeyStore(one).add(KeySpec(name="none", adapters=[]))
    keyring = keyring_of(two)
    key = keyring.find(secret)
    assert key is not None
    assert key == stored.key
    assert (key.name, key.scopes, key.adapters) == ("acme", {"infer", "adapters"}, ("acme/*", "prod"))
    assert (key.limits, key.weight) == (KeyLimits(requests_per_minute=60, tokens_per_month=10**12), 2.5)
    assert key.expires == datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (plain.key.adapters, none.key.adapters) == (None, ())
    assert [each.key.name for each in keyring.store.stored()] == [
        each.key.name for each in sorted((stored, plain, none), key=lambda each: each.order)
    ]
    assert secret.startswith(stored.prefix)


def test_no_secret_reaches_the_disk(tmp_path: Path) -> None:
    with closing(open_sqlite(tmp_path / "keys.sqlite3")) as database:
        store = KeyStore(database)
        stored, secret = store.add(KeySpec(name="a"))
        _, rotated = store.rotate(stored.key.id, 3600)
        written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for each in (secret, rotated):
        assert digest_of(each).encode() in written
        assert each.encode() not in written
        assert each[20:].encode() not in written
    assert "digest" not in repr(stored)
    assert "digest" not in stored.to_json()


def test_a_revoked_key_is_refused_at_once_here_and_soon_elsewhere(databases: tuple[Database, Database]) -> None:
    here, elsewhere = keyring_of(databases[0]), keyring_of(databases[1])
    assert not here.required
    stored, secret = here.store.add(KeySpec(name="a"))
    assert here.required
    assert here.find(secret) == stored.key
    elsewhere.start()
    try:
        soon(lambda: elsewhere.find(secret) == stored.key)
        assert elsewhere.required
        here.store.revoke(stored.key.id)
        assert here.find(secret) is None
        soon(lambda: elsewhere.find(secret) is None)
        assert elsewhere.required, "the last key is revoked: that must not open the server"
    finally:
        elsewhere.close()
    assert KeyStore(databases[1]).any
    assert here.store.get(stored.key.id).revoked is not None
    assert here.store.stored() == []
    for change in (here.store.revoke, here.store.rotate):
        with pytest.raises(UnknownKey):
            change(stored.key.id)


def soon(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON} s"
        time.sleep(0.02)


def test_revoked_keys_take_no_memory(databases: tuple[Database, Database]) -> None:
    """Keys that come and go, one for each job, must not fill a server's memory. They stay in the database."""
    here, elsewhere = (KeyStore(database) for database in databases)
    kept, _ = here.add(KeySpec(name="kept"))
    gone = [here.revoke(here.add(KeySpec(name=f"job-{number}"))[0].key.id) for number in range(4)]
    elsewhere.refresh()
    for store in (here, elsewhere, KeyStore(databases[1])):
        assert len(store) == 1
        assert store.stored() == [kept]
        assert {each.key.name for each in store.stored(revoked=True)} == {"kept", *(each.key.name for each in gone)}
        assert store.get(gone[2].key.id) == store.named(gone[2].key.id) == gone[2]
        ids = {kept.key.id, gone[0].key.id, "key_nothing"}
        assert store.names(ids) == {kept.key.id: "kept", gone[0].key.id: "job-0"}
    here.revoke(kept.key.id)
    assert len(here) == 0
    assert KeyStore(databases[1]).any, "without a key in memory, the server is not open to everybody"


def test_a_name_belongs_to_one_key_until_that_is_revoked(databases: tuple[Database, Database]) -> None:
    one, two = (KeyStore(database) for database in databases)
    first, _ = one.add(KeySpec(name="a"))
    with pytest.raises(KeyConflict, match="A key named `a` exists"):
        two.add(KeySpec(name="a"))
    two.revoke(first.key.id)
    second, _ = two.add(KeySpec(name="a"))
    assert second.key.id != first.key.id
    assert two.named("a") == second
    assert two.named(first.key.id).key.id == first.key.id
    with pytest.raises(UnknownKey, match="There is no key `b`"):
        two.named("b")


def test_an_id_is_not_taken_for_the_name_of_another_key(databases: tuple[Database, Database]) -> None:
    store = KeyStore(databases[0])
    leaked, _ = store.add(KeySpec(name="leaked"))
    store.add(KeySpec(name=leaked.key.id))
    assert store.named(leaked.key.id).key.name == "leaked"


def test_a_server_that_was_cut_off_forgets_a_key_whose_row_was_deleted_meanwhile(
    databases: tuple[Database, Database],
) -> None:
    here, cut_off = (KeyStore(database) for database in databases)
    kept, kept_secret = here.add(KeySpec(name="kept"))
    gone, secret = here.add(KeySpec(name="gone"))
    cut_off.refresh()
    here.revoke(gone.key.id)
    newest, newest_secret = here.add(KeySpec(name="newest"))
    with databases[0].adding() as connection:  # in one second both may be the newest key, whose row is never deleted
        connection.execute(update(api_keys).where(api_keys.c.id == gone.key.id).values(created=0))
    History(databases[0], 1, lambda: datetime.now(UTC) + timedelta(days=3)).shorten()
    with pytest.raises(UnknownKey):
        here.get(gone.key.id)
    keyring = Keyring(cut_off, NONE)
    assert keyring.find(secret) == gone.key, "it has not heard of anything yet"
    cut_off.refresh()
    assert keyring.find(secret) is None
    assert (keyring.find(kept_secret), keyring.find(newest_secret)) == (kept.key, newest.key)
    assert cut_off.stored() == here.stored()


def test_of_simultaneous_keys_with_one_name_one_is_made(databases: tuple[Database, Database]) -> None:
    stores = [KeyStore(database) for database in databases]
    made, refused = [], []

    def add(store: KeyStore) -> None:
        try:
            made.append(store.add(KeySpec(name="a")))
        except KeyConflict:
            refused.append(store)

    threads = [threading.Thread(target=add, args=(stores[index % 2],)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 5)


def test_a_key_expires(keyring: Keyring) -> None:
    stored, secret = keyring.store.add(KeySpec(name="a", expires=expiring(1.5)))
    assert keyring.find(secret) == stored.key
    time.sleep(2)
    assert keyring.find(secret) is None
    assert keyring.required
    _, rotated = keyring.store.rotate(stored.key.id, 60)
    assert keyring.find(rotated) is None, "a rotation does not prolong it"


def test_rotation(keyring: Keyring) -> None:
    stored, first = keyring.store.add(KeySpec(name="a", adapters=["x"]))
    rotated, second = keyring.store.rotate(stored.key.id)
    assert keyring.find(first) is None
    assert keyring.find(second) == stored.key, "the same key with all that it allows"
    assert rotated.old_until is None
    rotated, third = keyring.store.rotate(stored.key.id, 2)
    assert keyring.find(second) == keyring.find(third) == stored.key
    assert rotated.prefix == third[: len(rotated.prefix)]
    time.sleep(2.1)
    assert keyring.find(second) is None
    assert keyring.find(third) == stored.key
    keyring.store.rotate(stored.key.id, 3600)
    assert keyring.find(third) == stored.key
    keyring.store.revoke(stored.key.id)
    assert keyring.find(third) is None, "a revoked key has no overlap"


def test_a_restored_database_is_followed(tmp_path: Path) -> None:
    """An older copy knows neither the later keys nor the revocations, but the server does not open to everybody."""
    file, copy = tmp_path / "keys.sqlite3", tmp_path / "copy.sqlite3"
    with closing(open_sqlite(file)):
        pass
    shutil.copyfile(file, copy)
    with closing(open_sqlite(file)) as database:
        store = KeyStore(database)
        _, secret = store.add(KeySpec(name="a"))
        with closing(sqlite3.connect(copy)) as source, closing(sqlite3.connect(file)) as target:
            source.backup(target)
        store.refresh()
        assert store.stored() == []
        assert Keyring(store, NONE).find(secret) is None
        assert Keyring(store, NONE).required
        store.add(KeySpec(name="b"))
        assert [each.key.name for each in store.stored()] == ["b"]


def test_keys_stay_valid_while_the_database_is_away(server: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    with closing(open_postgres(server.fresh())) as database:
        keyring = keyring_of(database)
        stored, secret = keyring.store.add(KeySpec(name="a"))
        keyring.start()
        server.stop()
        try:
            deadline = time.monotonic() + 20
            while "those of the last reading stay valid" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            started = time.monotonic()
            assert keyring.find(secret) == stored.key
            assert keyring.find("sk-ml-wrong") is None
            assert time.monotonic() - started < 0.1, "no request waits for the database"
            with pytest.raises(RegistryUnavailable):
                keyring.store.revoke(stored.key.id)
        finally:
            server.start()
        deadline = time.monotonic() + 20
        while True:
            try:
                keyring.store.revoke(stored.key.id)
                break
            except RegistryUnavailable:
                assert time.monotonic() < deadline
        assert keyring.find(secret) is None
        keyring.close()
