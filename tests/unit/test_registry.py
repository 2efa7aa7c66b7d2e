"""The registry: names, leases, and bytes that stay exactly as long as somebody refers to them."""

import random
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from adapters.errors import AdapterNameError, AdapterRejected, UnknownAdapter
from adapters.registry import Adapter, Registry
from adapters.spec import AdapterId, AdapterSpec, BaseLayout
from adapters.store import AdapterStore
from tests.adapter_folders import DEFECTS, LAYERS, layout_of, write_adapter
from tests.tiny import tiny_model

MAX_RANK = 16


@cache
def tiny_layout() -> BaseLayout:
    return layout_of(tiny_model("llama"))


def write(folder: Path, seed: int) -> Path:
    return write_adapter(folder, tiny_layout(), seed=seed, rank=1, layers=LAYERS[:1])


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three different contents."""
    return [write(tmp_path / str(seed), seed) for seed in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store", tiny_layout(), MAX_RANK)


@pytest.fixture
def unused() -> list[AdapterId]:
    return []


@pytest.fixture
def registry(store: AdapterStore, unused: list[AdapterId]) -> Registry:
    return Registry(store, reserved=frozenset({"base"}), on_unused=unused.append)


def stored(store: AdapterStore) -> set[str]:
    return {path.name for path in store.root.iterdir()}


def test_a_name_stands_for_a_content(registry: Registry, folders: list[Path]) -> None:
    adapter, replaced = registry.register("legal", folders[0])
    assert not replaced
    assert registry.get("legal") is adapter
    assert adapter.name == "legal"
    assert adapter.created > 1_700_000_000


def test_a_list_is_in_the_order_of_names(registry: Registry, folders: list[Path]) -> None:
    for name in ("b", "a/z", "B", "a"):
        registry.register(name, folders[0])
    assert [adapter.name for adapter in registry.list()] == ["B", "a", "a/z", "b"]


def test_a_known_name_is_pointed_at_the_new_content(
    registry: Registry, store: AdapterStore, folders: list[Path], unused: list[AdapterId]
) -> None:
    old, _ = registry.register("legal", folders[0])
    new, replaced = registry.register("legal", folders[1])
    assert replaced
    assert registry.get("legal") is new
    assert stored(store) == {new.spec.id}
    assert unused == [old.spec.id]


def test_the_same_content_again_changes_nothing(
    registry: Registry, store: AdapterStore, folders: list[Path], unused: list[AdapterId]
) -> None:
    old, _ = registry.register("legal", folders[0])
    new, replaced = registry.register("legal", folders[0])
    assert replaced
    assert stored(store) == {old.spec.id} == {new.spec.id}
    assert unused == []


def test_two_names_share_a_content(registry: Registry, store: AdapterStore, folders: list[Path]) -> None:
    registry.register("a", folders[0])
    registry.register("b", folders[0])
    registry.remove("a")
    assert stored(store) == {registry.get("b").spec.id}
    registry.remove("b")
    assert stored(store) == set()


def test_a_rejected_folder_leaves_the_name_as_it_was(
    registry: Registry, store: AdapterStore, folders: list[Path], unused: list[AdapterId]
) -> None:
    adapter, _ = registry.register("legal", folders[0])
    DEFECTS["config_list"].spoil(folders[1])
    with pytest.raises(AdapterRejected):
        registry.register("legal", folders[1])
    assert registry.get("legal") is adapter
    assert stored(store) == {adapter.spec.id}
    assert unused == []


def test_leases_outlive_names(
    registry: Registry, store: AdapterStore, folders: list[Path], unused: list[AdapterId]
) -> None:
    registry.register("legal", folders[0])
    running = registry.acquire(["legal"])
    new, _ = registry.register("legal", folders[1])
    old = running[0].spec.id
    assert store.read(old).spec == running[0].spec
    registry.remove("legal")
    assert stored(store) == {old}
    assert unused == [new.spec.id]
    registry.release(running)
    assert stored(store) == set()
    assert unused == [new.spec.id, old]


def test_leases_are_counted_one_for_each_item(registry: Registry, store: AdapterStore, folders: list[Path]) -> None:
    registry.register("legal", folders[0])
    twice = registry.acquire(["legal", "legal"])
    registry.remove("legal")
    registry.release(twice[:1])
    assert stored(store) == {twice[0].spec.id}
    registry.release(twice[1:])
    assert stored(store) == set()


def test_a_mix_is_leased_whole_or_not_at_all(registry: Registry, store: AdapterStore, folders: list[Path]) -> None:
    registry.register("legal", folders[0])
    with pytest.raises(UnknownAdapter, match="The adapter `german` does not exist"):
        registry.acquire(["legal", "german"])
    registry.remove("legal")
    assert stored(store) == set()


def test_the_base_alone_leases_nothing(registry: Registry) -> None:
    assert registry.acquire([]) == ()


@pytest.mark.parametrize("count", [1, 2])
def test_a_lease_is_given_back_once(count: int, registry: Registry, store: AdapterStore, folders: list[Path]) -> None:
    registry.register("legal", folders[0])
    lease = registry.acquire(["legal"])
    registry.release(lease)
    held = registry.acquire(["legal"]) if count == 2 else ()
    with pytest.raises(ValueError, match="released more leases"):
        registry.release(lease * count)
    registry.remove("legal")
    assert stored(store) == {adapter.spec.id for adapter in held}


@pytest.mark.parametrize("act", ["get", "remove"])
def test_an_unknown_name_is_an_error(act: str, registry: Registry) -> None:
    with pytest.raises(UnknownAdapter, match="The adapter `x` does not exist"):
        getattr(registry, act)("x")


@pytest.mark.parametrize("name", ["a", "7", "legal-v1.2_final", "team/legal/german", "a" * 128, "Base", "a..b"])
def test_names_that_can_be_used(name: str, registry: Registry, folders: list[Path]) -> None:
    registry.register(name, folders[0])
    assert registry.get(name).name == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "1 to 128 characters, not 0"),
        ("a" * 129, "1 to 128 characters, not 129"),
        ("base", "it is the base model's name"),
        *((name, "only ASCII letters") for name in ("a,b", "a b", "a@1", "über", "a\n", "a\0", "a:b", "a\\b", "٣")),
        *((name, "the first is a letter or a digit") for name in (".a", "-a", "_a", "/a", "../a")),
        *((name, "an empty, `.` or `..` part") for name in ("a//b", "a/", "a/../b", "a/..", "a/./b")),
    ],
)
def test_names_that_cannot_be_used(
    name: str, reason: str, registry: Registry, store: AdapterStore, folders: list[Path]
) -> None:
    with pytest.raises(AdapterNameError, match=reason):
        registry.register(name, folders[0])
    assert stored(store) == set()
    assert registry.list() == []


def test_a_store_emptied_by_hand_does_not_keep_names_and_leases(
    registry: Registry, store: AdapterStore, folders: list[Path], unused: list[AdapterId]
) -> None:
    registry.register("legal", folders[0])
    lease = registry.acquire(["legal"])
    store.remove(lease[0].spec.id)
    registry.remove("legal")
    registry.release(lease)
    assert registry.list() == []
    assert unused == [lease[0].spec.id]


class InterruptedStore(AdapterStore):
    """A store where something else happens just after the first content was added."""

    between: object = None

    def add(self, folder: Path) -> AdapterSpec:
        spec = super().add(folder)
        between, self.between = self.between, None
        if callable(between):
            between()
        return spec


def test_content_that_goes_while_it_is_added_is_added_again(tmp_path: Path, folders: list[Path]) -> None:
    store = InterruptedStore(tmp_path / "store", tiny_layout(), MAX_RANK)
    registry = Registry(store)
    registry.register("old", folders[0])
    store.between = lambda: registry.remove("old")
    adapter, _ = registry.register("new", folders[0])
    assert store.read(adapter.spec.id).spec == adapter.spec
    assert stored(store) == {adapter.spec.id}


def test_of_two_registrations_of_a_name_the_later_to_finish_stays(tmp_path: Path, folders: list[Path]) -> None:
    store = InterruptedStore(tmp_path / "store", tiny_layout(), MAX_RANK)
    registry = Registry(store)
    store.between = lambda: registry.register("name", folders[1])
    adapter, replaced = registry.register("name", folders[0])
    assert replaced
    assert registry.get("name") is adapter
    assert stored(store) == {adapter.spec.id}


names = st.sampled_from(["a", "b", "c"])


class RegistryMachine(RuleBasedStateMachine):
    """Any order of calls: the bytes on disk are those of the contents that a name or a lease refers to."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folders = [write(self.root / str(seed), seed) for seed in range(3)]
        self.store = AdapterStore(self.root / "store", tiny_layout(), MAX_RANK)
        self.unused: Counter[AdapterId] = Counter()
        self.gone: Counter[AdapterId] = Counter()
        self.registry = Registry(self.store, on_unused=lambda adapter_id: self.unused.update([adapter_id]))
        self.model: dict[str, Adapter] = {}
        self.held: list[tuple[Adapter, ...]] = []
        self.on_disk: set[AdapterId] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(name=names, content=st.integers(0, 2))
    def register(self, name: str, content: int) -> None:
        adapter, replaced = self.registry.register(name, self.folders[content])
        assert replaced == (name in self.model)
        self.model[name] = adapter

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name in self.model:
            self.registry.remove(name)
            del self.model[name]
        else:
            with pytest.raises(UnknownAdapter):
                self.registry.remove(name)

    @rule(target=leases, mix=st.lists(names, max_size=3))
    def acquire(self, mix: list[str]) -> object:
        if not all(name in self.model for name in mix):
            with pytest.raises(UnknownAdapter):
                self.registry.acquire(mix)
            return multiple()
        lease = self.registry.acquire(mix)
        assert lease == tuple(self.model[name] for name in mix)
        self.held.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: tuple[Adapter, ...]) -> None:
        self.registry.release(lease)
        self.held.remove(lease)

    @invariant()
    def names_are_as_registered(self) -> None:
        assert self.registry.list() == [self.model[name] for name in sorted(self.model)]

    @invariant()
    def bytes_are_those_referred_to(self) -> None:
        referred = {adapter.spec.id for adapter in self.model.values()}
        referred |= {adapter.spec.id for lease in self.held for adapter in lease}
        assert stored(self.store) == referred
        self.gone.update(self.on_disk - referred)
        self.on_disk = referred
        assert self.unused == self.gone


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_threads(registry: Registry, store: AdapterStore, folders: list[Path]) -> None:
    """Eight threads over two names and three contents: a leased content can always be read, nothing is left over."""

    def work(seed: int) -> int:
        random_ = random.Random(seed)
        served = 0
        for _ in range(40):
            name = random_.choice("ab")
            try:
                match random_.randrange(3):
                    case 0:
                        registry.register(name, random_.choice(folders))
                    case 1:
                        registry.remove(name)
                    case _:
                        lease = registry.acquire([name])
                        assert store.read(lease[0].spec.id).spec == lease[0].spec
                        registry.release(lease)
                        served += 1
            except UnknownAdapter:
                continue
        return served

    with ThreadPoolExecutor(8) as threads:
        served = list(threads.map(work, range(8)))
    assert sum(served) > 0
    assert stored(store) == {adapter.spec.id for adapter in registry.list()}
    for adapter in registry.list():
        registry.remove(adapter.name)
    assert stored(store) == set()
