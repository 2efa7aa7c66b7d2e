"""The registry: versions, aliases, pins and leases; it is durable, and keeps bytes while anything refers to them."""

import json
import random
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from adapters.errors import (
    AdapterConflict,
    AdapterNameError,
    AdapterRejected,
    AdapterUnavailable,
    QuotaExceeded,
    RegistryUnavailable,
    RevisionMismatch,
    UnknownAdapter,
)
from adapters.format.spec import AdapterId, AdapterSpec
from adapters.registry import registry as module
from adapters.registry import schema
from adapters.registry.canary import choose_target
from adapters.registry.catalog import UNCHECKED
from adapters.registry.database import open_sqlite
from adapters.registry.registration import RegistrationOptions
from adapters.registry.registry import MISSING, Registry
from adapters.registry.snapshot import Alias, Target, Version
from adapters.store.remote_store import RemoteStore
from tests.adapter_folders import DEFECTS, WEIGHTS, set_config
from tests.unit.adapters.registries import ids_in, open_registry, stored, write

QUIETLY = RegistrationOptions(activate=False)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three different contents."""
    return [write(tmp_path / str(seed), seed) for seed in range(3)]


@pytest.fixture
def unused() -> list[AdapterId]:
    return []


@pytest.fixture
def registry(tmp_path: Path, unused: list[AdapterId]) -> Iterator[Registry]:
    with open_registry(tmp_path, reserved=frozenset({"base"}), on_unused=unused.append) as registry:
        yield registry


def settled(root: Path, contents: set[str]) -> None:
    """Wait until exactly these contents are on disk."""
    deadline = time.monotonic() + 10
    while (there := stored(root)) != contents:
        assert time.monotonic() < deadline, f"{there} on disk, not {contents}"
        time.sleep(0.005)


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(registry: Registry) -> object:
    """Return everything a caller can see, without what differs between equal registries."""
    return (
        [(e.name, e.active, e.pinned, {n: v.content for n, v in e.versions.items()}) for e in registry.entries()],
        [(a.name, a.targets) for a in registry.aliases()],
    )


# Versions


def test_each_new_content_is_a_version(registry: Registry, folders: list[Path]) -> None:
    first = registry.register_folder("legal", folders[0])
    second = registry.register_folder("legal", folders[1])
    assert (first.version.name, second.version.name) == ("legal@1", "legal@2")
    assert first.new
    assert second.new
    assert registry.version("legal") == registry.version("legal@2") == second.version
    assert registry.version("legal@1") == first.version


def test_same_content_reactivates_its_version(registry: Registry, folders: list[Path]) -> None:
    registry.register_folder("legal", folders[0])
    registry.register_folder("legal", folders[1])
    again = registry.register_folder("legal", folders[0])
    assert (again.new, again.version.number, again.entry.active) == (False, 1, 1)


def test_a_version_can_be_stored_without_being_active(registry: Registry, folders: list[Path]) -> None:
    registry.register_folder("legal", folders[0], QUIETLY)
    with pytest.raises(UnknownAdapter):
        registry.acquire(["legal"])
    registry.register_folder("legal", folders[1])
    registry.register_folder("legal", folders[2], QUIETLY)
    assert registry.version("legal").number == 2
    assert registry.version("legal@3").number == 3


def test_activate_rolls_back(registry: Registry, folders: list[Path]) -> None:
    old = registry.register_folder("legal", folders[0]).version
    registry.register_folder("legal", folders[1])
    assert registry.activate("legal", 1).current == old
    assert registry.acquire(["legal"])[0].version == old
    with pytest.raises(UnknownAdapter, match="legal@3"):
        registry.activate("legal", 3)
    with pytest.raises(UnknownAdapter, match="german"):
        registry.activate("german", 1)


def test_version_numbers_are_not_reused(registry: Registry, folders: list[Path]) -> None:
    registry.register_folder("legal", folders[0])
    registry.register_folder("legal", folders[1])
    registry.remove("legal")
    assert registry.register_folder("legal", folders[0]).version.name == "legal@3"


def test_one_version_can_be_removed(registry: Registry, folders: list[Path], tmp_path: Path) -> None:
    registry.register_folder("legal", folders[0])
    new = registry.register_folder("legal", folders[1]).version
    with pytest.raises(AdapterConflict, match="active version"):
        registry.remove("legal@2")
    registry.remove("legal@1")
    assert list(registry.entry("legal").versions) == [2]
    settled(tmp_path, {new.content})


def test_registration_removed_at_once_still_returns(
    registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh = registry.refresh

    def overtaken() -> None:
        monkeypatch.setattr(registry, "refresh", refresh)
        refresh()
        registry.remove("legal")

    monkeypatch.setattr(registry, "refresh", overtaken)
    registered = registry.register_folder("legal", folders[0])
    assert (registered.version.name, registered.new, registered.entry.versions) == ("legal@1", True, {})
    assert registry.entries() == []


# Aliases


@pytest.fixture
def canary(registry: Registry, folders: list[Path]) -> Alias:
    """90 to legal@1, 10 to legal@2."""
    for folder in folders[:2]:
        registry.register_folder("legal", folder)
    return registry.put_alias("prod", [Target("legal", 1, 90), Target("legal", 2, 10)])[0]


def test_alias_chooses_targets_by_weight(registry: Registry, canary: Alias) -> None:
    served = Counter(registry.acquire(["prod"])[0].version.number for _ in range(3000))
    assert 200 < served[2] < 400
    assert registry.acquire(["prod"])[0].alias == "prod"


def test_user_always_gets_the_same_target(registry: Registry, canary: Alias) -> None:
    users = [f"user {i}" for i in range(1000)]
    before = {user: registry.acquire(["prod"], user)[0].version.number for user in users}
    assert {user: registry.acquire(["prod"], user)[0].version.number for user in users} == before
    assert 50 < sum(number == 2 for number in before.values()) < 150
    registry.put_alias("prod", [Target("legal", 1, 50), Target("legal", 2, 50)])
    after = {user: registry.acquire(["prod"], user)[0].version.number for user in users}
    assert all(after[user] == 2 for user in users if before[user] == 2)
    assert 400 < sum(number == 2 for number in after.values()) < 600


def test_last_target_absorbs_rounding() -> None:
    alias = Alias("prod", (Target("a", 1, 5e-324), Target("b", 1, 5e-324)), 0, 0)
    assert {choose_target(alias, str(user)).adapter for user in range(100)} <= {"a", "b"}


def test_target_without_version_follows_the_active_version(registry: Registry, folders: list[Path]) -> None:
    registry.register_folder("legal", folders[0])
    registry.put_alias("prod", [Target("legal", None, 1)])
    registry.register_folder("legal", folders[1])
    assert registry.acquire(["prod"])[0].version.name == "legal@2"


def test_alias_target_cannot_be_removed(registry: Registry, canary: Alias) -> None:
    for reference in ("legal", "legal@1"):
        with pytest.raises(AdapterConflict, match="alias `prod`"):
            registry.remove(reference)
    registry.put_alias("prod", [Target("legal", 2, 1)])
    registry.remove("legal@1")
    registry.remove_alias("prod")
    registry.remove("legal")
    assert registry.names() == []


def test_alias_targets_must_exist(registry: Registry, canary: Alias, folders: list[Path]) -> None:
    registry.register_folder("quiet", folders[0], QUIETLY)
    before = state(registry)
    for target in (Target("legal", 3, 1), Target("german", None, 1), Target("prod", None, 1)):
        with pytest.raises(UnknownAdapter):
            registry.put_alias("other", [target])
    with pytest.raises(AdapterConflict, match="no active version"):
        registry.put_alias("other", [Target("quiet", None, 1)])
    assert state(registry) == before


def test_adapters_and_aliases_share_names(registry: Registry, canary: Alias, folders: list[Path]) -> None:
    with pytest.raises(AdapterConflict, match="is an alias already"):
        registry.register_folder("prod", folders[2])
    with pytest.raises(AdapterConflict, match="is an adapter already"):
        registry.put_alias("legal", [Target("legal", 1, 1)])
    with pytest.raises(UnknownAdapter):
        registry.remove("prod")
    with pytest.raises(UnknownAdapter):
        registry.remove_alias("legal")


# Names


def test_names_that_differ_in_case_only_cannot_both_exist(
    registry: Registry, folders: list[Path], tmp_path: Path
) -> None:
    kept = registry.register_folder("legal", folders[0]).version.content
    with pytest.raises(AdapterNameError, match="upper and lower case only"):
        registry.register_folder("Legal", folders[1])
    with pytest.raises(AdapterNameError, match="upper and lower case only"):
        registry.put_alias("LEGAL", [Target("legal", 1, 1)])
    settled(tmp_path, {kept})
    registry.remove("legal")
    assert registry.register_folder("Legal", folders[1]).version.name == "Legal@1"


def test_everything_servable_is_listed_in_pages(registry: Registry, canary: Alias, folders: list[Path]) -> None:
    registry.register_folder("legal-x", folders[2])
    registry.register_folder("quiet", folders[2], QUIETLY)
    names = [name for name, _ in registry.names()]
    assert names == ["legal", "legal@1", "legal@2", "legal-x", "legal-x@1", "prod", "quiet@1"]
    assert all(registry.knows(name) for name in names)
    assert not registry.knows("quiet")
    current = [name for name, _ in registry.names(versions=False)]
    assert current == ["legal", "legal-x", "prod"]
    for versions, expected in ((True, names), (False, current)):
        for size in (1, 2, 3):
            paged: list[str] = []
            while page := [name for name, _ in registry.names(paged[-1] if paged else "", size, versions=versions)]:
                paged += page
            assert paged == expected
    assert [name for name, _ in registry.names("legal@1", versions=False)] == ["legal-x", "prod"]
    assert [entry.name for entry in registry.entries("legal", 1)] == ["legal-x"]


def test_names_of_prefers_the_active_name(registry: Registry, canary: Alias) -> None:
    contents = [registry.version(f"legal@{number}").content for number in (1, 2)]
    assert registry.names_of(contents) == ["legal", "legal@1"]
    assert registry.names_of([AdapterId("0" * 64)]) == []
    assert registry.aliased_to("legal") == ["prod"]


# Leases


def test_leased_content_outlives_its_name(
    registry: Registry, folders: list[Path], tmp_path: Path, unused: list[AdapterId]
) -> None:
    registry.register_folder("legal", folders[0])
    leases = registry.acquire(["legal", "legal"])
    content = leases[0].version.content
    registry.remove("legal")
    with pytest.raises(UnknownAdapter):
        registry.acquire(["legal"])
    registry.release(leases[:1])
    time.sleep(0.05)
    assert stored(tmp_path) == {content}
    registry.release(leases[1:])
    settled(tmp_path, set())
    assert unused == [content]


def test_mix_is_leased_atomically(registry: Registry, folders: list[Path], tmp_path: Path) -> None:
    registry.register_folder("legal", folders[0])
    with pytest.raises(UnknownAdapter, match="The adapter `german` does not exist"):
        registry.acquire(["legal", "german"])
    registry.remove("legal")
    settled(tmp_path, set())


def test_lease_is_released_only_once(registry: Registry, folders: list[Path]) -> None:
    registry.register_folder("legal", folders[0])
    lease = registry.acquire(["legal"])
    registry.release(lease)
    with pytest.raises(ValueError, match="released more leases"):
        registry.release(lease)


def test_two_names_share_a_content(registry: Registry, folders: list[Path], tmp_path: Path) -> None:
    content = registry.register_folder("a", folders[0]).version.content
    registry.register_folder("b", folders[0])
    registry.remove("a")
    assert stored(tmp_path) == {content}
    assert registry.usage().bytes == sum(f.stat().st_size for f in folders[0].iterdir())
    registry.remove("b")
    settled(tmp_path, set())
    soon(lambda: registry.usage().bytes == 0)


# Refusals change nothing


def test_a_rejected_folder_leaves_the_name_as_it_was(
    registry: Registry, folders: list[Path], tmp_path: Path, unused: list[AdapterId]
) -> None:
    version = registry.register_folder("legal", folders[0]).version
    DEFECTS["config_list"].spoil(folders[1])
    with pytest.raises(AdapterRejected):
        registry.register_folder("legal", folders[1])
    assert registry.version("legal") == version
    assert stored(tmp_path) == {version.content}


def test_failed_dry_load_refuses(tmp_path: Path, folders: list[Path]) -> None:
    def probe(spec: AdapterSpec, keep: bool) -> dict[str, float]:
        if len(probed) == 1:
            raise AdapterRejected("changes nothing")
        probed.append(spec.id)
        return {"max_logit_change": 0.5}

    probed: list[AdapterId] = []
    with open_registry(tmp_path, probe=probe) as registry:
        version = registry.register_folder("legal", folders[0]).version
        receipt = registry.receipt(version)
        assert receipt is not None
        assert receipt["probe"] == {"max_logit_change": 0.5}
        with pytest.raises(AdapterRejected, match="changes nothing"):
            registry.register_folder("legal", folders[1])
        assert registry.version("legal") == version
        settled(tmp_path, {version.content})
        # Content that has passed on this base is not checked again.
        assert registry.register_folder("other", folders[0]).new


def test_quota_is_enforced(tmp_path: Path, folders: list[Path]) -> None:
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    with open_registry(tmp_path, quota=2 * size + 100) as registry:
        registry.register_folder("a", folders[0])
        registry.register_folder("b", folders[1])
        before = state(registry)
        with pytest.raises(QuotaExceeded, match=r"takes \d+ bytes, and \d+ of the quota"):
            registry.register_folder("c", folders[2])
        registry.register_folder("c", folders[0])  # stores no additional bytes
        registry.remove("c")
        assert state(registry) == before
        registry.remove("b")
        settled(tmp_path, {registry.version("a").content})
        registry.register_folder("c", folders[2])


def test_change_with_an_expected_revision(registry: Registry, canary: Alias, folders: list[Path]) -> None:
    seen = registry.entry("legal").revision
    registry.activate("legal", 1, expected=seen)
    before = state(registry)
    stale: list[Callable[[], object]] = [
        lambda: registry.activate("legal", 2, expected=seen),
        lambda: registry.pin("legal", True, expected=seen),
        lambda: registry.remove("legal@2", expected=seen),
        lambda: registry.register_folder("legal", folders[2], RegistrationOptions(expected=seen)),
        lambda: registry.put_alias("prod", [Target("legal", 1, 1)], expected=seen),
        lambda: registry.put_alias("new", [Target("legal", 1, 1)], expected=seen),
        lambda: registry.remove_alias("prod", expected=seen),
    ]
    for change in stale:
        with pytest.raises(RevisionMismatch):
            change()
    assert state(registry) == before


# Pins


def test_pins_follow_the_active_version(tmp_path: Path, folders: list[Path]) -> None:
    told: list[list[str]] = []
    with open_registry(tmp_path, on_pins=lambda versions: told.append([v.name for v in versions])) as registry:
        registry.register_folder("legal", folders[0], RegistrationOptions(pinned=True))
        registry.register_folder("german", folders[1])
        registry.pin("german", True)
        registry.register_folder("legal", folders[2])
        registry.pin("legal", False)
        registry.remove("german")
    assert told == [["legal@1"], ["german@1", "legal@1"], ["german@1", "legal@2"], ["german@1"], []]


def test_more_pins_than_fit_are_refused(tmp_path: Path, folders: list[Path]) -> None:
    with open_registry(tmp_path, fits=lambda ranks: len(ranks) < 2) as registry:
        registry.register_folder("a", folders[0], RegistrationOptions(pinned=True))
        registry.register_folder("b", folders[1])
        before = state(registry)
        for change in (
            lambda: registry.pin("b", True),
            lambda: registry.register_folder("b", folders[1], RegistrationOptions(pinned=True)),
            lambda: registry.register_folder("c", folders[2], RegistrationOptions(pinned=True)),
        ):
            with pytest.raises(AdapterConflict, match="do not fit the device"):
                change()
        assert state(registry) == before
        registry.register_folder(
            "c", folders[0], RegistrationOptions(pinned=True)
        )  # the same content needs no second slot


# Durability


def test_state_survives_a_restart(tmp_path: Path, folders: list[Path]) -> None:
    with open_registry(tmp_path) as registry:
        for folder in folders:
            registry.register_folder("legal", folder)
        registry.activate("legal", 2)
        registry.register_folder("german", folders[0], RegistrationOptions(pinned=True))
        registry.put_alias("prod", [Target("legal", 1, 90), Target("german", None, 10)])
        registry.register_folder("gone", folders[0])
        registry.remove("gone")
        before = state(registry)
        receipt = registry.receipt(registry.version("legal"))
    with open_registry(tmp_path) as registry:
        assert state(registry) == before
        assert registry.receipt(registry.version("legal")) == receipt
        assert registry.register_folder("gone", folders[1]).version.name == "gone@2"


def test_start_deletes_what_a_crash_left(tmp_path: Path, folders: list[Path]) -> None:
    with open_registry(tmp_path) as registry:
        kept = registry.register_folder("legal", folders[0]).version.content
        registry._contents.reserve(AdapterSpec(AdapterId("f" * 64), {}, 1), 1, None)
    (tmp_path / "adapters" / ".tmp-half").mkdir()
    shutil.copytree(tmp_path / "adapters" / kept, tmp_path / "adapters" / ("e" * 64))
    with open_registry(tmp_path) as registry:
        assert stored(tmp_path) == {kept}
        assert registry._contents.unreferenced(0) == []


def test_missing_bytes_are_reported_and_can_be_registered_again(tmp_path: Path, folders: list[Path]) -> None:
    with open_registry(tmp_path) as registry:
        version = registry.register_folder("legal", folders[0]).version
    shutil.rmtree(tmp_path / "adapters" / version.content)
    with open_registry(tmp_path) as registry:
        assert registry.version("legal").refused == MISSING
        with pytest.raises(AdapterUnavailable, match="register it again"):
            registry.acquire(["legal"])
        assert not registry.register_folder("legal", folders[0]).new
        assert registry.acquire(["legal"])[0].version == version


def test_another_base_runs_its_own_checks(tmp_path: Path, folders: list[Path]) -> None:
    probed: list[AdapterId] = []

    def probe(spec: AdapterSpec, keep: bool) -> dict[str, float]:
        probed.append(spec.id)
        if spec.id == bad:
            raise AdapterRejected("changes nothing")
        return {}

    with open_registry(tmp_path) as registry:
        good = registry.register_folder("good", folders[0]).version.content
        bad = registry.register_folder("bad", folders[1]).version.content
    for _ in range(2):  # the second start has the result
        with open_registry(tmp_path, base="another", probe=probe) as registry:
            assert sorted(probed) == sorted([good, bad])
            assert registry.version("good").refused is None
            with pytest.raises(AdapterUnavailable, match="`bad` cannot be served: changes nothing"):
                registry.acquire(["bad"])
    with open_registry(tmp_path) as registry:
        assert registry.version("bad").refused is None


def test_allowed_mismatch_holds_for_equivalent_fingerprints(tmp_path: Path, folders: list[Path]) -> None:
    """As after an update that quantised it again: the operator need not allow it once more."""
    (folders[0] / "manylora.json").write_text(json.dumps({"base_fingerprint": "f" * 64}))
    with open_registry(tmp_path, base="before") as registry:
        registry.register_folder("foreign", folders[0], RegistrationOptions(allow_base_mismatch=True))
    with open_registry(tmp_path, base="after", equivalents=frozenset({"before"})) as registry:
        version = registry.version("foreign")
        receipt = registry.receipt(version)
        assert version.refused is None
        assert receipt is not None
        assert (receipt["base_fingerprint"], receipt["base_mismatch_allowed"]) == ("after", True)
    with open_registry(tmp_path, base="another") as registry:
        assert "trained on the base" in str(registry.version("foreign").refused)


def test_unknown_fields_are_in_every_receipt_and_allowed_once(tmp_path: Path, folders: list[Path]) -> None:
    set_config(folders[0], shift=0.5)
    with open_registry(tmp_path) as registry:
        with pytest.raises(AdapterRejected, match="shift: is not known"):
            registry.register_folder("odd", folders[0])
        assert registry.entries() == []
        registered = registry.register_folder("odd", folders[0], RegistrationOptions(allow_unknown_fields=True))
        plain = registry.register_folder("plain", folders[1], RegistrationOptions(allow_unknown_fields=True))
        assert noted(registry, registered.version) == ["shift"]
        assert noted(registry, plain.version) == []
    with open_registry(tmp_path, base="another") as registry:
        assert registry.version("odd").refused is None
        assert noted(registry, registry.version("odd")) == ["shift"]


def noted(registry: Registry, version: Version) -> object:
    """Return the unknown fields that its receipt names."""
    receipt = registry.receipt(version)
    assert receipt is not None
    return receipt["unknown_fields_allowed"]


def test_rank_above_max_rank_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = write(tmp_path / "large", 0, rank=8)
    with open_registry(tmp_path) as registry:
        registry.register_folder("large", folder, RegistrationOptions(pinned=True))
    pins: list[list[Version]] = []
    reason = "rank 8 is above this server's --max-rank 4"
    with (
        open_registry(tmp_path, max_rank=4, on_pins=lambda v: pins.append(list(v))) as registry,
        pytest.raises(AdapterUnavailable, match=reason),
    ):
        registry.acquire(["large"])
    assert pins == []


def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    open_sqlite(tmp_path / "registry.sqlite3").close()
    engine = create_engine(f"sqlite:///{tmp_path / 'registry.sqlite3'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "registry.sqlite3"
    open_sqlite(file).close()
    connection = sqlite3.connect(file)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    before = file.read_bytes()
    with pytest.raises(schema.NewerSchema, match="9999"):
        open_sqlite(file)
    assert file.read_bytes() == before


def test_the_first_schema_is_migrated(tmp_path: Path) -> None:
    """A registry as release 0.2 wrote it, with an adapter, two versions and an alias."""
    file = tmp_path / "registry.sqlite3"
    connection = sqlite3.connect(file)
    connection.executescript((Path(__file__).parent / "registry_0001.sql").read_text())
    connection.close()
    (tmp_path / "adapters").mkdir()
    with open_registry(tmp_path) as registry:
        assert state(registry) == (
            [("legal", 1, True, {1: AdapterId("a" * 64), 2: AdapterId("b" * 64)})],
            [("prod", (Target("legal", 1, 90.0), Target("legal", None, 10.0)))],
        )
        receipt = registry.receipt(registry.version("legal@2"))
        assert receipt is not None
        assert receipt["source"] == "folder legal"
        assert "taken_from" not in receipt, "nobody has noted that then"


def test_missing_content_is_restored_for_all_its_names(tmp_path: Path, folders: list[Path]) -> None:
    with open_registry(tmp_path) as registry:
        content = registry.register_folder("a", folders[0]).version.content
        registry.register_folder("b", folders[0])
    shutil.rmtree(tmp_path / "adapters" / content)
    with open_registry(tmp_path) as registry:
        registry.register_folder("a", folders[0])
        assert [lease.version.content for lease in registry.acquire(["a", "b"])] == [content] * 2


def test_later_admission_applies_to_all_names_of_the_content(tmp_path: Path, folders: list[Path]) -> None:
    outcomes: list[Exception] = [AdapterRejected("changes nothing")]

    def probe(spec: AdapterSpec, keep: bool) -> dict[str, float]:
        if outcomes:
            raise outcomes.pop()
        return {}

    with open_registry(tmp_path) as registry:
        registry.register_folder("a", folders[0])
        registry.register_folder("b", folders[0])
    with open_registry(tmp_path, base="another", probe=probe) as registry:
        assert registry.version("b").refused == "changes nothing"
        registry.register_folder("a", folders[0])
        assert registry.version("b").refused is None


def test_failed_check_blocks_nothing_and_is_retried(
    tmp_path: Path, folders: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three contents, one is damaged, and the engine has no room for the dry load of another."""
    failures: list[AdapterId] = []

    def probe(spec: AdapterSpec, keep: bool) -> dict[str, float]:
        if spec.id == unlucky and not failures:
            failures.append(spec.id)
            raise RuntimeError("no room")
        return {}

    with open_registry(tmp_path) as registry:
        damaged, unlucky, good = [
            registry.register_folder(name, folder).version.content
            for name, folder in zip(("damaged", "unlucky", "good"), folders, strict=True)
        ]
    (tmp_path / "adapters" / damaged / WEIGHTS).write_bytes(b"rotten")
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    with open_registry(tmp_path, base="another", probe=probe) as registry:
        assert registry.acquire(["good"])[0].version.content == good
        soon(lambda: registry.version("unlucky").refused is None)
        assert registry.version("damaged").refused == UNCHECKED
        registry.remove("damaged")
        time.sleep(0.2)
        told = len(caplog.records)
        time.sleep(0.3)
        assert len(caplog.records) == told, "what is gone is still being checked"


def test_pins_that_no_longer_fit_only_block_more_pins(tmp_path: Path, folders: list[Path]) -> None:
    with open_registry(tmp_path) as registry:
        for name, folder in zip("abc", folders, strict=True):
            registry.register_folder(name, folder, RegistrationOptions(pinned=True))
    with open_registry(tmp_path, fits=lambda ranks: len(ranks) < 2) as registry:
        registry.register_folder("d", write(tmp_path / "d", 7))
        registry.register_folder("a", folders[0])
        with pytest.raises(AdapterConflict, match="4 pinned adapters"):
            registry.pin("d", True)
        for name in "ab":
            registry.pin(name, False)
        with pytest.raises(AdapterConflict, match="2 pinned adapters"):
            registry.pin("a", True)


@pytest.mark.parametrize("name", ["a\ud800", "a\0", "\n", "x" * 129])
def test_invalid_names_are_unknown(name: str, registry: Registry, folders: list[Path]) -> None:
    registry.register_folder("legal", folders[0])
    for change in (
        lambda: registry.remove(name),
        lambda: registry.activate(name, 1),
        lambda: registry.pin(name, True),
        lambda: registry.remove_alias(name),
        lambda: registry.put_alias("prod", [Target(name, None, 1)]),
    ):
        with pytest.raises(UnknownAdapter):
            change()


def test_folder_name_that_is_not_utf8(registry: Registry, folders: list[Path], tmp_path: Path) -> None:
    version = registry.register_folder("legal", folders[0].rename(tmp_path / "od\udcffd")).version
    receipt = registry.receipt(version)
    assert receipt is not None
    assert receipt["source"] == "folder od\\udcffd"


def test_removal_succeeds_although_the_bytes_cannot_be_deleted(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(RemoteStore):
        def delete(self, adapter_id: AdapterId) -> None:
            if away:
                raise RegistryUnavailable("the store does not answer")
            super().delete(adapter_id)

    away = [True]
    remote = Away(f"file://{tmp_path}/remote")
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    with open_registry(tmp_path, remote=remote) as registry:
        content = registry.register_folder("legal", folders[0]).version.content
        registry.remove("legal")
        assert not registry.knows("legal")
        time.sleep(0.2)
        assert list(ids_in(remote)) == [content]
        assert registry.available
        away.clear()
        soon(lambda: not list(ids_in(remote)) and registry.usage().bytes == 0)


def test_a_registration_asks_a_remote_store_once_for_a_record(tmp_path: Path, folders: list[Path]) -> None:
    class Counting(RemoteStore):
        def has_record(self, adapter_id: AdapterId, record: str) -> bool:
            asked.append(record)
            return super().has_record(adapter_id, record)

    asked: list[str] = []
    (folders[0] / "README.md").write_text("# Legal")
    with open_registry(tmp_path, remote=Counting(f"file://{tmp_path}/remote")) as registry:
        content = registry.register_folder("legal", folders[0]).version.content
        assert len(asked) == 1
        with registry._store.shown(content, "legal") as (_, record):
            assert (record / "README.md").read_text() == "# Legal"


def test_special_characters_in_the_database_path(tmp_path: Path) -> None:
    folder = tmp_path / "what?x=1#%41"
    folder.mkdir()
    open_sqlite(folder / "registry.sqlite3").close()
    assert (folder / "registry.sqlite3").exists()


def test_damaged_database_is_reported(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite3").write_bytes(b"not a database " * 1000)
    with pytest.raises(RegistryUnavailable, match="database is damaged"):
        open_sqlite(tmp_path / "registry.sqlite3")


def test_a_database_that_is_damaged_later_is_noticed_although_nobody_changes_anything(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    with open_registry(tmp_path) as registry:
        registry.register_folder("legal", folders[0])
        for file in tmp_path.glob("registry.sqlite3*"):
            with file.open("r+b") as damaged:
                damaged.write(b"x" * file.stat().st_size)
        soon(lambda: not registry.available)
        assert registry.knows("legal"), "requests are served from memory"


# Many at once


def test_concurrent_acquire_register_and_remove(registry: Registry, folders: list[Path], tmp_path: Path) -> None:
    """Eight threads, two names, three contents: leased content can always be read, and nothing is left over."""

    def work(seed: int) -> int:
        random_ = random.Random(seed)
        served = 0
        for _ in range(25):
            name = random_.choice("ab")
            try:
                match random_.randrange(4):
                    case 0:
                        registry.register_folder(name, random_.choice(folders))
                    case 1:
                        registry.remove(name)
                    case 2:
                        registry.activate(name, random_.randint(1, 3))
                    case _:
                        lease = registry.acquire([name])
                        assert registry._store.read(lease[0].version.content).spec.id == lease[0].version.content
                        registry.release(lease)
                        served += 1
            except UnknownAdapter:
                continue
        return served

    with ThreadPoolExecutor(8) as threads:
        served = list(threads.map(work, range(8)))
    assert sum(served) > 0
    settled(tmp_path, {v.content for entry in registry.entries() for v in entry.versions.values()})
    for entry in registry.entries():
        registry.remove(entry.name)
    settled(tmp_path, set())


def test_ten_registrations_of_one_name_at_once(registry: Registry, tmp_path: Path) -> None:
    contents = [write(tmp_path / f"c{seed}", seed) for seed in range(10)]
    with ThreadPoolExecutor(10) as threads:
        done = list(threads.map(lambda folder: registry.register_folder("legal", folder), contents))
    assert sorted(each.version.number for each in done) == list(range(1, 11))
    assert registry.entry("legal").active in range(1, 11)
    assert len(stored(tmp_path)) == 10


def test_ten_registrations_of_one_content_at_once(registry: Registry, folders: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(10) as threads:
        done = list(threads.map(lambda i: registry.register_folder(f"name-{i}", folders[0]), range(10)))
    assert len({each.version.content for each in done}) == 1
    settled(tmp_path, {done[0].version.content})
