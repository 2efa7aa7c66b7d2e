"""The demo model with an adapter, for the official clients."""

from collections.abc import Iterator

import pytest

from adapters.format.spec import BaseLayout
from bases.base import load_base
from server.api.startup import open_service
from server.config import Settings
from tests.adapter_folders import LAYERS, write_adapter
from tests.api.live import Live, running

LAYOUT = BaseLayout("", {LAYERS[0]: (576, 576), LAYERS[1]: (1536, 576)})


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of the demo model with the adapter ``red``."""
    root = tmp_path_factory.mktemp("clients")
    write_adapter(root / "red", LAYOUT, lora_alpha=0.5)
    settings = Settings(data_dir=root / "data", adapter={"red": root / "red"}, max_model_len=2048, kv_memory_gib=0.5)
    with running(open_service(load_base(settings.base), settings)) as live:
        yield live


@pytest.fixture(params=["smollm2-135m-instruct", "red"])
def model(request: pytest.FixtureRequest) -> str:
    """The base, then an adapter."""
    name: str = request.param
    return name
