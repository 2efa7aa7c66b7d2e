"""Fixtures: one server with three adapters, shared by most tests."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from bases.base import load_base
from server.api.startup import open_service
from server.config import Settings
from tests.adapter_folders import DEMO_LAYOUT, write_adapter
from tests.api.forks import Forks
from tests.api.live import ADAPTERS, Live, enduring_model, running, tiny_service, wait_for
from tests.tiny import save_adapter, tiny_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Adapter folders by name, all under one root; ``spare`` is registered nowhere."""
    root = tmp_path_factory.mktemp("adapters")
    model = tiny_model()
    lora = {**ADAPTERS, "spare": {"r": 3, "lora_alpha": 3, "target_modules": ["k_proj"]}}
    return {
        name: save_adapter(model, root / name.replace("/", "-"), seed=index, **arguments)
        for index, (name, arguments) in enumerate(lora.items())
    }


@pytest.fixture(scope="session")
def shared(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that most tests share."""
    service = tiny_service(
        tmp_path_factory.mktemp("server"),
        adapter={name: folders[name] for name in ADAPTERS},
        adapter_root=folders["red"].parent,
        max_body_mib=0.25,
        max_rank=16,
    )
    with running(service) as live:
        yield live


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose context has room for tools, with one adapter, ``red``."""
    root = tmp_path_factory.mktemp("roomy")
    red = save_adapter(enduring_model(), root / "red", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    with running(tiny_service(root, enduring_model(), adapter={"red": red}, max_model_len=4096)) as live:
        yield live


@pytest.fixture(scope="session")
def demo(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of the demo model, where the text matters, with an adapter that changes little, ``red``."""
    root = tmp_path_factory.mktemp("demo")
    (root / "data").mkdir()
    (root / "data" / "bases").symlink_to(demo_root / "bases")
    write_adapter(root / "red", DEMO_LAYOUT, lora_alpha=0.5)
    settings = Settings(data_dir=root / "data", adapter={"red": root / "red"}, max_model_len=2048, kv_memory_gib=0.5)
    with running(open_service(load_base(settings.base), settings)) as live:
        live.http.timeout = 300  # a hundred answers share two cores
        yield live


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts servers in processes of their own."""
    with Forks() as forks:
        yield forks


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The shared server; asserts that it is idle again after the test."""
    yield shared
    wait_for(shared.idle)
    versions = [list(entry.versions) for entry in shared.service.registry.entries()]
    assert [entry.name for entry in shared.service.registry.entries()] == sorted(ADAPTERS)
    assert versions == [[1]] * len(ADAPTERS)
    assert shared.service.registry.aliases() == []
