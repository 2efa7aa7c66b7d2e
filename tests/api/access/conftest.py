"""A server with keys, and clients that send them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.access.key_spec import KeySpec
from tests.api.access.callers import Caller, caller
from tests.api.live import ADAPTERS, PATIENCE, Live, enduring_model, running, tiny_service
from tests.tiny import save_adapter

KEYS: Mapping[str, Mapping[str, Any]] = {
    "admin": {"scopes": ["admin"]},
    "infer": {"scopes": ["infer"]},
    "adapters": {"scopes": ["adapters"]},
    "train": {"scopes": ["train"]},
    "metrics": {"scopes": ["metrics"]},
    "team": {"scopes": ["infer", "adapters", "metrics"], "adapters": ["team/*", "prod", "TEAM/*"]},
    "none": {"scopes": ["infer"], "adapters": []},
}
"""Name -> what the key of that name allows."""


@dataclass(frozen=True)
class Keyed:
    """A server with the adapters ``red``, ``green`` and ``team/blue``, and one client for each of :data:`KEYS`."""

    live: Live
    secrets: Mapping[str, str]
    clients: Mapping[str, httpx.Client]

    def __getitem__(self, name: str) -> httpx.Client:
        """Return the client that sends the key of this name."""
        return self.clients[name]


def client(live: Live, secret: str) -> httpx.Client:
    """Return a client that sends a key."""
    headers = {"authorization": f"Bearer {secret}"}
    return httpx.Client(base_url=live.http.base_url, timeout=PATIENCE, headers=headers)


@pytest.fixture(scope="session")
def keyed(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """The server that the tests of this folder share."""
    service = tiny_service(
        tmp_path_factory.mktemp("keyed"),
        adapter={name: folders[name] for name in ADAPTERS},
        adapter_root=folders["red"].parent,
        max_body_mib=0.25,
        max_rank=16,
    )
    secrets = {name: service.keyring.store.add(KeySpec(name=name, **allowed))[1] for name, allowed in KEYS.items()}
    with running(service) as live:
        clients = {name: client(live, secret) for name, secret in secrets.items()}
        clients["nobody"] = live.http
        try:
            yield Keyed(live, secrets, clients)
        finally:
            for name in KEYS:
                clients[name].close()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose context has room for long answers, with one adapter, ``red``."""
    root = tmp_path_factory.mktemp("guarded")
    red = save_adapter(enduring_model(), root / "red", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    with running(tiny_service(root, enduring_model(), adapter={"red": red}, adapter_root=root)) as live:
        yield live


@pytest.fixture(scope="session")
def admin(guarded: Live) -> Iterator[Caller]:
    """A key of ``guarded`` with the scope ``admin``."""
    with caller(guarded, "admin") as admin:
        yield admin
