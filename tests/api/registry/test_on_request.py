"""Adapters that are fetched when a request names their address (``--fetch-on-request``)."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from adapters.format.files import CONFIG, WEIGHTS
from adapters.sources.address import local_name
from adapters.sources.sources import FetchedAdapter, Sources
from bases.errors import ConfigError
from server.api.registry import fetches
from server.api.registry.fetches import Fetches
from server.config import Settings
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, request, running, tiny_service, wait_for
from tests.api.registry.test_adapters import upload
from tests.hub import COMMIT, Site, publish, site, use_as_hub

LEGAL = "hf://org/legal"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NEXT = "f" * 40


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def hub(patch: pytest.MonkeyPatch) -> Iterator[Site]:
    with site() as here:
        use_as_hub(here, patch)
        yield here


@pytest.fixture(scope="module")
def fetching(tmp_path_factory: pytest.TempPathFactory, hub: Site) -> Iterator[Live]:
    """A server that fetches from one owner of the hub."""
    root = tmp_path_factory.mktemp("fetching")
    with running(tiny_service(root, allow_source=("hf://org",), fetch_on_request=True, max_rank=16)) as live:
        yield live


@pytest.fixture
def live(fetching: Live, hub: Site) -> Iterator[Live]:
    """The server, without adapters and with an empty hub."""
    hub.answers.clear()
    hub.requests.clear()
    fetching.service.fetches._refusals.clear()
    yield fetching
    for entry in fetching.service.registry.entries():
        fetching.http.delete(f"/v1/adapters/{entry.name}").raise_for_status()
    wait_for(fetching.idle)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def legal(hub: Site, live: Live, folders: Mapping[str, Path]) -> dict[str, bytes]:
    """The files of ``hf://org/legal``, which the hub has."""
    found = files(folders["red"])
    publish(hub, found, name="org/legal")
    return found


@pytest.mark.parametrize("field", ["model", "adapter"])
def test_first_request_registers_and_later_ones_do_not_fetch(
    live: Live, legal: object, hub: Site, folders: Mapping[str, Path], field: str
) -> None:
    answer = live.complete(**{field: LEGAL})
    asked = len(hub.requests)
    assert asked > 0
    assert answer["model"] == (LEGAL if field == "model" else "tiny")
    (applied,) = answer["adapter"]
    assert applied["name"].startswith("hf/org/legal@")
    assert answer["choices"][0]["text"] != live.text()
    upload(live, folders["red"], name="same").raise_for_status()
    assert answer["choices"][0]["text"] == live.text(adapter="same")
    card = live.http.get("/v1/adapters/hf/org/legal").json()
    assert (card["id"], card["receipt"]["source"]) == ("hf/org/legal", f"{LEGAL}@{COMMIT}")
    for name in (LEGAL, f"{LEGAL}/", "hf/org/legal", applied["name"]):
        assert live.complete(adapter=name)["adapter"] == [applied]
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": LEGAL, "max_tokens": 2}
    assert live.stream(CHAT, **chat)[0]["model"] == LEGAL
    assert len(hub.requests) == asked
    assert "hf/org/legal" in [model["id"] for model in live.http.get("/v1/models").json()["data"]]


def test_a_mix_of_addresses_and_names(live: Live, legal: object, hub: Site, folders: Mapping[str, Path]) -> None:
    publish(hub, files(folders["green"]), name="org/german", revision="v1")
    upload(live, folders["spare"], name="spare").raise_for_status()
    names = [LEGAL, "spare", "hf://org/german@v1"]
    answer = live.complete(adapter=[{"name": name, "weight": 0.5} for name in names])
    assert [each["name"].partition("@")[0] for each in answer["adapter"]] == [
        "hf/org/legal",
        "spare",
        "hf/org/german/at/v1",
    ]


def test_a_refresh_is_a_registration_under_the_same_name(
    live: Live, legal: object, hub: Site, folders: Mapping[str, Path]
) -> None:
    first = live.complete(adapter=LEGAL)
    publish(hub, files(folders["green"]), name="org/legal", commit=NEXT)
    assert live.complete(adapter=LEGAL)["adapter"] == first["adapter"], "the commit is pinned"
    renewed = live.http.post("/v1/adapters", json={"name": "hf/org/legal", "source": LEGAL})
    assert renewed.status_code == 201
    second = live.complete(adapter=LEGAL)
    assert second["adapter"][0]["name"] == f"hf/org/legal@{renewed.json()['version']}"
    assert second["choices"][0]["text"] != first["choices"][0]["text"]
    live.http.delete("/v1/adapters/hf/org/legal").raise_for_status()
    assert live.complete(adapter=LEGAL)["adapter"][0]["id"] == second["adapter"][0]["id"], "a removed one is fetched"


def test_a_restart_does_not_fetch_again(tmp_path: Path, hub: Site, folders: Mapping[str, Path]) -> None:
    hub.answers.clear()
    publish(hub, files(folders["red"]), name="org/legal")
    settings: dict[str, Any] = {"allow_source": ("hf://org",), "fetch_on_request": True, "max_rank": 16}
    with running(tiny_service(tmp_path, **settings)) as live:
        first = live.complete(adapter=LEGAL)
    asked = len(hub.requests)
    with running(tiny_service(tmp_path, **settings)) as live:
        assert live.complete(adapter=LEGAL)["adapter"] == first["adapter"]
    with running(tiny_service(tmp_path, max_rank=16)) as live:
        assert live.complete(adapter="hf/org/legal")["adapter"] == first["adapter"]
        for field in ("adapter", "model"):
            error = live.http.post(COMPLETIONS, json=request(**{field: LEGAL}))
            assert "--fetch-on-request" in refused(live, error, 404, field)["message"]
    assert len(hub.requests) == asked


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["model", "adapter"])
def test_refusals(live: Live, legal: dict[str, bytes], hub: Site, field: str, stream: bool) -> None:
    publish(hub, {**legal, CONFIG: b"{}"}, name="org/broken")
    publish(hub, {CONFIG: legal[CONFIG]}, name="org/half")
    for name, status, reason in (
        ("hf://org/broken", 422, CONFIG),
        ("hf://org/half", 400, f"has no {WEIGHTS}"),
        ("hf://org/missing", 400, "does not exist"),
        ("hf://org", 400, "is not a repository"),
        ("hf://elsewhere/legal", 400, "--allow-source"),
        ("s3://bucket/legal", 400, "--allow-source"),
        ("http://127.0.0.1/legal", 400, "the source is not hf://OWNER/NAME"),
        ("://", 400, "the source is not hf://OWNER/NAME"),
    ):
        response = live.http.post(COMPLETIONS, json=request(**{field: name}, stream=stream))
        assert reason in refused(live, response, status, field)["message"]
    assert live.service.registry.entries() == []


def test_a_refusal_is_repeated_without_another_download(
    live: Live, legal: dict[str, bytes], hub: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = request(adapter="hf://org/new")
    first = live.http.post(COMPLETIONS, json=body).json()
    asked = len(hub.requests)
    publish(hub, legal, name="org/new")
    assert live.http.post(COMPLETIONS, json=body).json() == first
    assert len(hub.requests) == asked
    monkeypatch.setattr(fetches, "REFUSAL_SECONDS", 0.0)
    live.complete(adapter="hf://org/new")


def test_a_name_that_others_use_is_not_taken_for_the_address(
    live: Live, legal: object, hub: Site, folders: Mapping[str, Path]
) -> None:
    upload(live, folders["green"], name="hf/org/legal").raise_for_status()
    error = refused(live, live.http.post(COMPLETIONS, json=request(adapter=LEGAL)), 409, None)
    assert (error["code"], hub.requests) == ("name_taken", [])
    live.complete(adapter="hf/org/legal")


class Gate:
    """Holds downloads back until it is opened, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = Event()
        self.downloads = 0
        fetch = Sources.fetch

        def wait(sources: Sources, address: str, staging: Path) -> FetchedAdapter:
            self.downloads += 1
            assert self.open.wait(60)
            return fetch(sources, address, staging)

        monkeypatch.setattr(Sources, "fetch", wait)


def test_simultaneous_requests_fetch_once(live: Live, legal: object, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=live.http.base_url, timeout=60) as http:
        answers = [pool.submit(http.post, COMPLETIONS, json=request(adapter=LEGAL)) for _ in range(8)]
        wait_for(lambda: gate.downloads == 1)
        live.complete()  # others are served meanwhile
        gate.open.set()
        texts = {answer.result().json()["choices"][0]["text"] for answer in answers}
    assert (len(texts), gate.downloads) == (1, 1)


def test_a_fetch_continues_when_its_client_leaves(live: Live, legal: object, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with pytest.raises(httpx.ReadTimeout):
        live.http.post(COMPLETIONS, json=request(adapter=LEGAL), timeout=0.3)
    wait_for(lambda: gate.downloads == 1)
    gate.open.set()
    wait_for(lambda: live.service.registry.knows("hf/org/legal"))
    live.complete(adapter=LEGAL)
    wait_for(lambda: live.service.in_progress == 0)
    assert gate.downloads == 1


def test_too_many_fetches_at_once(live: Live, legal: object, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(fetches, "MAX_FETCHES", 2)
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=live.http.base_url, timeout=60) as http:
        first = [pool.submit(http.post, COMPLETIONS, json=request(adapter=f"hf://org/m{i}")) for i in range(2)]
        wait_for(lambda: gate.downloads == 2)
        response = live.http.post(COMPLETIONS, json=request(adapter=LEGAL))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "too_many_fetches"
        gate.open.set()
        assert {answer.result().status_code for answer in first} == {400}
    live.complete(adapter=LEGAL)


def test_few_versions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetches, "MAX_VERSIONS", 3)

    async def fetch_all() -> list[str]:
        known = Fetches()
        for name in ("a", "b", "a", "c", "d"):
            await known.run(name, lambda name=name: asyncio.sleep(0, f"{name}@1"))
            await asyncio.sleep(0)
        return list(known.versions.values())

    assert asyncio.run(fetch_all()) == ["a@1", "c@1", "d@1"]


def test_the_quota_holds(tmp_path: Path, hub: Site, folders: Mapping[str, Path]) -> None:
    hub.answers.clear()
    publish(hub, files(folders["red"]), name="org/legal")
    settings: dict[str, Any] = {"allow_source": ("hf://org",), "fetch_on_request": True, "store_quota_gib": 1e-7}
    with running(tiny_service(tmp_path, **settings)) as live:
        error = refused(live, live.http.post(COMPLETIONS, json=request(adapter=LEGAL)), 507, None)
        assert error["code"] == "quota_exceeded"
        assert live.service.registry.entries() == []


def test_fetching_needs_allowed_sources() -> None:
    with pytest.raises(ConfigError, match="--fetch-on-request: needs --allow-source"):
        Settings(fetch_on_request=True)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("legal", "legal"),
        ("legal@2", "legal@2"),
        ("hf://org/legal", "hf/org/legal"),
        ("hf://org/legal/", "hf/org/legal"),
        ("hf://org/legal@v1", "hf/org/legal/at/v1"),
        ("hf://org/legal@refs/pr/1", "hf/org/legal/at/refs/pr/1"),
        ("s3://bucket/team/legal", "s3/bucket/team/legal"),
        ("hf://org/le gal", "hf://org/le gal"),
    ],
)
def test_names_of_addresses(address: str, name: str) -> None:
    assert local_name(address) == name


@pytest.mark.parametrize("key", ["a=b", "x" * 200])
def test_an_address_that_makes_no_name_is_named_by_its_digest(key: str) -> None:
    name = local_name(f"gs://bucket/{key}")
    assert re.fullmatch("gs/[0-9a-f]{32}", name)
    assert name != local_name(f"gs://bucket/{key}x")
