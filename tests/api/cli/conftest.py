"""A server for the commands that talk with one: long answers, two adapters, keys."""

from collections.abc import Callable, Iterator

import pytest

from server.access.key_spec import KeySpec
from tests.api.live import Live, enduring_model, running, tiny_service
from tests.tiny import save_adapter

ADAPTERS = ("red", "team/blue")


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, str]]:
    """A server with ``red`` and ``team/blue``, and a key of it that may do everything."""
    root = tmp_path_factory.mktemp("talkative")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    folders = {name: save_adapter(enduring_model(), root / f"{at}", at, **lora) for at, name in enumerate(ADAPTERS)}
    model = enduring_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = 258  # unset, it is 2: `#` here
    service = tiny_service(root, model, adapter=folders, max_model_len=8192)
    _, secret = service.keyring.store.add(KeySpec(name="all", scopes=["admin"]))
    with running(service) as live:
        live.http.headers["authorization"] = f"Bearer {secret}"
        yield live, secret


@pytest.fixture
def served(keyed: tuple[Live, str], monkeypatch: pytest.MonkeyPatch) -> Live:
    """The server; commands find its key in the environment."""
    live, secret = keyed
    monkeypatch.setenv("MANYLORA_API_KEY", secret)
    return live


@pytest.fixture
def key(served: Live) -> Callable[..., str]:
    """Make a key and return its secret."""

    def make(*scopes: str, **limits: int) -> str:
        name = f"key-{len(served.service.keyring.store)}"
        return served.service.keyring.store.add(
            KeySpec.model_validate({"name": name, "scopes": scopes, "limits": limits})
        )[1]

    return make
