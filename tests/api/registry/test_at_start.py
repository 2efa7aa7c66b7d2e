"""Adapters that ``--adapter`` names: what has not changed is registered once, and addresses are fetched at a start."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.format.files import CONFIG, WEIGHTS
from bases.errors import ConfigError
from server.config import read_settings
from tests.api.live import Live, running, tiny_service
from tests.hub import COMMIT, Site, publish, site, use_as_hub

LEGAL = "hf://org/legal"
NEXT = "f" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with site() as here:
        use_as_hub(here, monkeypatch)
        yield here


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def active(live: Live) -> dict[str, int]:
    return {each["id"]: each["active"] for each in live.http.get("/v1/adapters").json()["data"]}


def test_a_start_fetches_each_address_once(tmp_path: Path, hub: Site, folders: Mapping[str, Path]) -> None:
    publish(hub, files(folders["red"]), name="org/legal", revision="v1")
    settings: dict[str, Any] = {"max_rank": 16}
    named = {"adapter": f"legal=hf://org/legal@v1,green={folders['green']}"}
    with running(tiny_service(tmp_path, **settings, **named)) as live:
        assert active(live) == {"green": 1, "legal": 1}
        assert live.complete(adapter="legal")["adapter"][0]["name"] == "legal@1"
        assert live.http.get("/v1/adapters/legal").json()["receipt"]["source"] == f"hf://org/legal@{COMMIT}"
        other = live.http.post("/v1/adapters", json={"name": "other", "source": "hf://org/legal@v1"})
        assert other.status_code == 400, "naming an adapter at start allows its address to nobody else"
    hub.answers.clear()
    hub.requests.clear()
    with running(tiny_service(tmp_path, **settings, **named)) as live:
        assert active(live) == {"green": 1, "legal": 1}
        assert not hub.requests, "a restart needs no hub"


def test_another_revision_is_the_next_version_and_a_restart_undoes_no_roll_back(
    tmp_path: Path, hub: Site, folders: Mapping[str, Path]
) -> None:
    publish(hub, files(folders["red"]), name="org/legal", revision="v1")
    publish(hub, files(folders["green"]), name="org/legal", revision="v2", commit=NEXT)
    tiny_service(tmp_path, max_rank=16, adapter="legal=hf://org/legal@v1").close()
    for rolled_back in (False, True):
        with running(tiny_service(tmp_path, max_rank=16, adapter="legal=hf://org/legal@v2")) as live:
            assert active(live) == {"legal": 1 if rolled_back else 2}
            live.http.post("/v1/adapters/legal/activate", json={"version": 1}).raise_for_status()


def test_a_folder_is_registered_again_only_if_it_has_changed(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    """Ray starts replicas by itself, at any time: none may undo what was activated since."""
    folder = shutil.copytree(folders["red"], tmp_path / "legal")
    with running(tiny_service(tmp_path, adapter={"legal": folder})) as live:
        live.service.registry.register_folder("legal", folders["green"])
        assert active(live) == {"legal": 2}
    with running(tiny_service(tmp_path, adapter={"legal": folder})) as live:
        assert active(live) == {"legal": 2}
    shutil.copytree(folders["spare"], folder, dirs_exist_ok=True)
    with running(tiny_service(tmp_path, adapter={"legal": folder})) as live:
        assert active(live) == {"legal": 3}


def test_an_adapter_that_was_removed_is_fetched_again(tmp_path: Path, hub: Site, folders: Mapping[str, Path]) -> None:
    publish(hub, files(folders["red"]), name="org/legal")
    for _ in range(2):
        with running(tiny_service(tmp_path, max_rank=16, adapter="legal=hf://org/legal")) as live:
            live.http.delete("/v1/adapters/legal").raise_for_status()


def test_what_cannot_be_fetched_ends_the_start(tmp_path: Path, hub: Site) -> None:
    with pytest.raises(ConfigError, match=r"^--adapter: legal=hf://org/legal: "):
        tiny_service(tmp_path, adapter="legal=hf://org/legal")


@pytest.mark.parametrize("address", ["hf://", "ftp://org/legal", "hf://a b/c"])
def test_an_odd_address_is_refused_before_the_base_loads(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"^--adapter: legal="):
        tiny_service(tmp_path, adapter={"legal": address})


def test_addresses_on_the_command_line() -> None:
    settings = read_settings(["--adapter", f"legal={LEGAL}@v1", "--adapter", "other=~/other"])
    assert settings.adapter == {"legal": f"{LEGAL}@v1", "other": Path("~/other").expanduser()}
