"""Random sequences of calls and restarts, compared with a simple model of a registry."""

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from adapters.errors import AdapterConflict, AdapterError, AdapterNameError, UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.in_memory import Lease
from adapters.registry.registration import RegistrationOptions
from adapters.registry.registry import Registry
from adapters.registry.snapshot import Target
from tests.unit.adapters.registries import open_registry, stored, write

MAX_PINS = 2

names = st.sampled_from(["a", "b", "B", "prod"])
numbers = st.integers(1, 4)


@dataclass
class Model:
    """The model's state of one adapter."""

    active: int | None = None
    pinned: bool = False
    versions: dict[int, AdapterId] = field(default_factory=dict)


class RegistryMachine(RuleBasedStateMachine):
    """Asserts that registry and disk equal the model after each call, and that errors change nothing."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folders = [write(self.root / str(seed), seed) for seed in range(3)]
        self.adapters: dict[str, Model] = {}
        self.aliases: dict[str, tuple[Target, ...]] = {}
        self.last: dict[str, int] = {}
        self.held: list[tuple[Lease, ...]] = []
        self._start()
        self.ids = [self._id(folder) for folder in self.folders]

    def _start(self) -> None:
        self.opened: AbstractContextManager[Registry] = open_registry(
            self.root, fits=lambda ranks: len(ranks) <= MAX_PINS
        )
        self.registry = self.opened.__enter__()

    def _id(self, folder: Path) -> AdapterId:
        with self.registry._store.stage() as staging:
            self.registry._store.copy(folder, staging)
            return self.registry._store.seal(staging).id

    def teardown(self) -> None:
        self.opened.__exit__(None, None, None)
        shutil.rmtree(self.root)

    def _expect(self, error: type[AdapterError] | None, change: Callable[[], object]) -> bool:
        """Make a change; assert that it succeeds unless ``error`` is due. Returns whether it did."""
        if error is None:
            change()
            return True
        with pytest.raises(error):
            change()
        return False

    def _taken(self, name: str, kind: str) -> type[AdapterError] | None:
        other = self.aliases if kind == "adapter" else self.adapters
        if name in other:
            return AdapterConflict
        twins = [n for n in [*self.adapters, *self.aliases] if n != name and n.lower() == name.lower()]
        return AdapterNameError if twins else None

    def _too_many_pins(self, name: str, model: Model) -> bool:
        after = {**self.adapters, name: model}
        return len({m.versions[m.active] for m in after.values() if m.pinned and m.active}) > MAX_PINS

    @rule(name=names, content=st.integers(0, 2), activate=st.booleans(), pinned=st.sampled_from([None, True, False]))
    def register(self, name: str, content: int, activate: bool, pinned: bool | None) -> None:
        old = self.adapters.get(name, Model())
        same = [number for number, held in old.versions.items() if held == self.ids[content]]
        number = same[0] if same else self.last.get(name, 0) + 1
        new = Model(
            number if activate else old.active,
            old.pinned if pinned is None else pinned,
            old.versions | {number: self.ids[content]},
        )
        error = self._taken(name, "adapter") or (AdapterConflict if self._too_many_pins(name, new) else None)
        options = RegistrationOptions(activate=activate, pinned=pinned)
        if self._expect(error, lambda: self.registry.register_folder(name, self.folders[content], options)):
            self.adapters[name] = new
            self.last[name] = max(number, self.last.get(name, 0))

    @rule(name=names, number=numbers)
    def activate(self, name: str, number: int) -> None:
        model = self.adapters.get(name)
        error: type[AdapterError] | None = None
        if model is None or number not in model.versions:
            error = UnknownAdapter
        elif self._too_many_pins(name, Model(number, model.pinned, model.versions)):
            error = AdapterConflict
        if self._expect(error, lambda: self.registry.activate(name, number)):
            self.adapters[name].active = number

    @rule(name=names, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        model = self.adapters.get(name)
        error: type[AdapterError] | None = None
        if model is None:
            error = UnknownAdapter
        elif self._too_many_pins(name, Model(model.active, pinned, model.versions)):
            error = AdapterConflict
        if self._expect(error, lambda: self.registry.pin(name, pinned)):
            self.adapters[name].pinned = pinned

    @rule(name=names)
    def remove(self, name: str) -> None:
        error: type[AdapterError] | None = None
        if name not in self.adapters:
            error = UnknownAdapter
        elif any(target.adapter == name for targets in self.aliases.values() for target in targets):
            error = AdapterConflict
        if self._expect(error, lambda: self.registry.remove(name)):
            del self.adapters[name]

    @rule(name=names, number=numbers)
    def remove_version(self, name: str, number: int) -> None:
        model = self.adapters.get(name)
        error: type[AdapterError] | None = None
        if model is None or number not in model.versions:
            error = UnknownAdapter
        elif model.active == number or any(
            (target.adapter, target.version) == (name, number) for each in self.aliases.values() for target in each
        ):
            error = AdapterConflict
        if self._expect(error, lambda: self.registry.remove(f"{name}@{number}")):
            del self.adapters[name].versions[number]

    @rule(name=names, adapter=names, number=st.none() | numbers)
    def put_alias(self, name: str, adapter: str, number: int | None) -> None:
        error = self._taken(name, "alias")
        model = self.adapters.get(adapter)
        if error is None:
            if model is None or (number is not None and number not in model.versions):
                error = UnknownAdapter
            elif number is None and model.active is None:
                error = AdapterConflict
        targets = (Target(adapter, number, 1.0),)
        if self._expect(error, lambda: self.registry.put_alias(name, targets)):
            self.aliases[name] = targets

    @rule(name=names)
    def remove_alias(self, name: str) -> None:
        error = None if name in self.aliases else UnknownAdapter
        if self._expect(error, lambda: self.registry.remove_alias(name)):
            del self.aliases[name]

    @rule(
        target=leases, reference=st.builds(lambda name, number: f"{name}{number}", names, st.sampled_from(["", "@1"]))
    )
    def acquire(self, reference: str) -> object:
        meant = self.aliases[reference][0].reference if reference in self.aliases else reference
        name, _, number = meant.partition("@")
        model = self.adapters.get(name, Model())
        content = model.versions.get(int(number) if number else model.active or 0)
        if content is None:
            with pytest.raises(UnknownAdapter):
                self.registry.acquire([reference])
            return multiple()
        lease = self.registry.acquire([reference])
        assert lease[0].version.content == content
        self.held.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: tuple[Lease, ...]) -> None:
        if lease in self.held:
            self.registry.release(lease)
            self.held.remove(lease)

    @rule()
    def restart(self) -> None:
        self.opened.__exit__(None, None, None)
        self.held.clear()
        self._start()

    @invariant()
    def the_registry_is_the_model(self) -> None:
        found = {
            entry.name: Model(entry.active, entry.pinned, {n: v.content for n, v in entry.versions.items()})
            for entry in self.registry.entries()
        }
        assert found == self.adapters
        assert {alias.name: alias.targets for alias in self.registry.aliases()} == self.aliases

    @invariant()
    def bytes_are_those_referred_to(self) -> None:
        referred = {content for model in self.adapters.values() for content in model.versions.values()}
        referred |= {lease.version.content for leases in self.held for lease in leases}
        deadline = time.monotonic() + 10
        while stored(self.root) != referred:
            assert time.monotonic() < deadline, f"{stored(self.root)} on disk, not {referred}"
            time.sleep(0.002)


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
