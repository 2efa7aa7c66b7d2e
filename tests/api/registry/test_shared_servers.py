"""Two servers with one PostgreSQL and one store act as one registry, also while PostgreSQL is down."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.live import Live, request, running, tiny_service, wait_for
from tests.api.registry.test_adapters import card_of, upload
from tests.postgres import Postgres, postgres
from tests.tiny import save_adapter, tiny_model

SOON = 2.0
"""Seconds within which a change made through one server is served by the other."""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, model = tmp_path_factory.mktemp("written"), tiny_model()
    return [save_adapter(model, root / str(seed), seed=seed, r=2, target_modules=["q_proj"]) for seed in range(3)]


@pytest.fixture
def pair(server: Postgres, tmp_path: Path) -> Iterator[tuple[Live, Live]]:
    shared = {"database_url": server.fresh(), "store_url": f"file://{tmp_path}/shared", "max_rank": 8}
    with ExitStack() as stack:
        one, two = (stack.enter_context(running(tiny_service(tmp_path / name, **shared))) for name in ("one", "two"))
        yield one, two


def soon(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON} s"
        time.sleep(0.02)


def ask(live: Live, name: str) -> httpx.Response:
    return live.http.post("/v1/completions", json=request(adapter=name))


def served(live: Live, name: str) -> str | None:
    """Return the version that serves a name; None if there is none."""
    response = ask(live, name)
    assert response.status_code in (200, 404), response.text
    return response.json()["adapter"][0]["name"] if response.is_success else None


def test_changes_of_one_server_are_served_by_the_other(pair: tuple[Live, Live], written: list[Path]) -> None:
    one, two = pair
    assert upload(one, written[0], name="legal").status_code == 201
    soon(lambda: served(two, "legal") == "legal@1")
    first = one.text(adapter="legal")
    assert two.text(adapter="legal") == first != two.text()
    assert upload(two, written[1], name="legal").json()["version"] == 2
    soon(lambda: served(one, "legal") == "legal@2")
    assert one.text(adapter="legal") == two.text(adapter="legal") != first
    one.http.post("/v1/adapters/legal/activate", json={"version": 1}).raise_for_status()
    soon(lambda: served(two, "legal") == "legal@1")
    two.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "legal@2"}]}).raise_for_status()
    soon(lambda: served(one, "prod") == "legal@2")
    two.http.post("/v1/adapters/legal/pin", json={"pinned": True}).raise_for_status()
    soon(lambda: card_of(one, "legal")["pinned"])
    ids = [[model["id"] for model in live.http.get("/v1/models?versions=true").json()["data"]] for live in pair]
    assert ids == [["tiny", "legal", "legal@1", "legal@2", "prod"]] * 2
    assert card_of(one, "legal@1")["receipt"] == card_of(two, "legal@1")["receipt"]
    one.http.delete("/v1/aliases/prod").raise_for_status()
    two.http.delete("/v1/adapters/legal").raise_for_status()
    soon(lambda: served(one, "legal") is served(one, "prod") is None)


def test_stream_survives_a_deletion_on_another_server(pair: tuple[Live, Live], written: list[Path]) -> None:
    one, two = pair
    upload(one, written[0], name="legal").raise_for_status()
    soon(lambda: served(two, "legal"))
    expected, content = two.text(adapter="legal", max_tokens=200), two.content("legal")
    with two.http.stream("POST", "/v1/completions", json=request(adapter="legal", max_tokens=200, stream=True)) as got:
        one.http.delete("/v1/adapters/legal").raise_for_status()
        soon(lambda: served(one, "legal") is None)
        lines = [line.removeprefix("data: ") for line in got.iter_lines() if line]
    pieces = [httpx.Response(200, content=line).json() for line in lines[:-1]]
    assert (lines[-1], "".join(piece["choices"][0]["text"] for piece in pieces)) == ("[DONE]", expected)
    soon(lambda: served(two, "legal") is None)
    wait_for(lambda: not content.exists())


def test_one_of_concurrent_changes_wins(pair: tuple[Live, Live], written: list[Path]) -> None:
    one, two = pair
    for folder in written:
        upload(one, folder, name="legal").raise_for_status()
    soon(lambda: served(two, "legal") == "legal@3")

    def activate(live: Live, number: int, seen: str) -> httpx.Response:
        return live.http.post("/v1/adapters/legal/activate", json={"version": number}, headers={"if-match": seen})

    for _ in range(5):
        seen = {live.http.get("/v1/adapters/legal").headers["etag"] for live in pair}
        (revision,) = seen
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(activate, pair, (1, 2), (revision, revision)))
        assert sorted(answer.status_code for answer in answers) == [200, 412]
        (won,) = (answer.json()["active"] for answer in answers if answer.is_success)
        for live in pair:
            soon(lambda live=live, won=won: served(live, "legal") == f"legal@{won}")
        soon(lambda: len({live.http.get("/v1/adapters/legal").headers["etag"] for live in pair}) == 1)


@contextmanager
def traffic(live: Live, name: str, text: str) -> Iterator[list[float]]:
    """Send requests on a thread; assert that all answers are right. Yields the list of their times (monotonic)."""
    stop, answered, wrong = threading.Event(), [], []

    def run() -> None:
        with httpx.Client(base_url=live.http.base_url, timeout=live.http.timeout) as client:
            while not stop.is_set():
                response = client.post("/v1/completions", json=request(adapter=name))
                if response.status_code == 200 and response.json()["choices"][0]["text"] == text:
                    answered.append(time.monotonic())
                else:
                    wrong.append(response.text)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()
    assert not wrong, wrong[:3]


def test_postgres_stopped_and_started_under_traffic(
    server: Postgres, pair: tuple[Live, Live], written: list[Path]
) -> None:
    one, two = pair
    upload(one, written[0], name="legal").raise_for_status()
    soon(lambda: served(two, "legal"))
    text = one.text(adapter="legal")
    with traffic(one, "legal", text) as first, traffic(two, "legal", text) as second:
        wait_for(lambda: first and second)
        server.stop()
        try:
            down = time.monotonic()
            for live in pair:
                assert_unavailable(live, written[1])
            wait_for(lambda: first[-1] > down + 1 and second[-1] > down + 1)
        finally:
            server.start()
        for index, live in enumerate(pair):
            wait_for(lambda live=live: live.service.registry.available)
            card: dict[str, Any] = upload(live, written[1 + index], name="german").json()
            assert card["version"] == 1 + index, card
        soon(lambda: served(one, "german") == served(two, "german") == "german@2")
    assert two.text(adapter="german@1") == one.text(adapter="german@1") != text


def assert_unavailable(live: Live, folder: Path) -> None:
    """Changes get a 503 with Retry-After; lookups keep working."""
    http = live.http
    for response in (
        upload(live, folder, name="german"),
        http.post("/v1/adapters/legal/activate", json={"version": 1}),
        http.post("/v1/adapters/legal/pin", json={"pinned": True}),
        http.put("/v1/aliases/prod", json={"targets": [{"adapter": "legal"}]}),
        http.delete("/v1/adapters/legal"),
        http.get("/v1/adapters/legal"),  # its receipt is in the database
    ):
        assert response.status_code == 503, response.text
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "registry_unavailable"
    assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["tiny", "legal"]
    assert [each["id"] for each in http.get("/v1/adapters").json()["data"]] == ["legal"]
    assert http.get("/readyz").status_code == 200
