"""Everything at once: registering, choosing, aliasing, deleting and asking. No 5xx, no wrong word, nothing left over.

Right is what Hugging Face and PEFT alone say of the content whose id an answer gives.
"""

import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.format.content import content_id
from tests.api.live import PATIENCE, Live, events, request, running, tiny_service, wait_for
from tests.api.registry.test_adapters import upload
from tests.numeric.oracle import CLEAR, Mix, Oracle
from tests.tiny import save_adapter, tiny_model, tiny_tokenizer
from tests.unit.adapters.registries import open_registry, stored, write

CONTENTS = 8
NAMES = ("legal", "german", "team/red", "x")
ALIASES = ("prod", "canary")
PROMPTS = tuple(f"The {word} of" for word in ("price", "colour", "length", "weight", "names", "sounds", "moons"))
LENGTH = 24
"""Number of tokens of an answer."""
WORKERS = 8


@dataclass(frozen=True)
class World:
    """Adapters to register, and the right answers."""

    folders: Sequence[Path]
    answers: Mapping[tuple[str, str], str]
    """(content id, or "" for the base; prompt) -> greedy text of LENGTH tokens."""
    prompts: Sequence[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root, model, tokenizer = tmp_path_factory.mktemp("world"), tiny_model(), tiny_tokenizer()
    folders = [
        save_adapter(model, root / str(seed), seed=seed, r=2 + 2 * (seed % 3), target_modules=["q_proj", "v_proj"])
        for seed in range(CONTENTS)
    ]
    oracle = Oracle(model, {content_id(folder): folder for folder in folders})
    mixes: dict[str, Mix] = {"": (), **{id_: ((id_, 1.0),) for id_ in map(content_id, folders)}}
    answers: dict[tuple[str, str], str] = {}
    prompts = []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        solos = {id_: oracle.solo(mix, tokens, LENGTH) for id_, mix in mixes.items()}
        if min(solo.gap for solo in solos.values()) > CLEAR:
            prompts.append(prompt)
            for id_, solo in solos.items():
                answers[id_, prompt] = tokenizer.decode(solo.tokens, skip_special_tokens=True)
    assert len(prompts) > 1
    assert len(set(answers.values())) == len(answers), "answers that are all alike would prove nothing"
    return World(folders, answers, prompts)


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Live]:
    """A server with fewer places on the device, and in host memory, than there are adapters."""
    with running(tiny_service(tmp_path, max_device_adapters=3, host_cache_gib=1e-4, max_rank=8)) as live:
        yield live


def ids(live: Live) -> set[str]:
    """Return the ids of the stored contents."""
    return {path.name for path in live.service.store.root.iterdir()} - {".lock"}


def assert_nothing_left(live: Live) -> None:
    """Assert that all leases are released, the engine is consistent, and stored contents equal the listed ones."""
    wait_for(live.idle)
    registry = live.service.registry
    assert (registry._leases, registry._held) == (Counter(), Counter())
    listed = {version.content for entry in registry.entries() for version in entry.versions.values()}
    wait_for(lambda: ids(live) == listed)
    wait_for(
        lambda: (
            live.service.engine.stats().device_adapters <= listed
            and live.service.engine.stats().host_adapters <= listed
        )
    )
    live.service.engine.check()
    assert (live.service.engine.stats().healthy, live.service.engine.stats().failed_steps) == (True, 0)


def test_engine_drops_content_before_its_bytes_are_deleted(tmp_path: Path) -> None:
    """Otherwise a load that fails because they are gone may fail the next registration of the same content."""
    told: list[bool] = []
    root = tmp_path / "registry"
    with open_registry(root, on_unused=lambda content: told.append((root / "adapters" / content).is_dir())) as registry:
        registry.register_folder("legal", write(tmp_path / "legal", seed=0))
        registry.remove("legal")
    assert (told, stored(root)) == ([True], set())


def at_once(*calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [running.result() for running in [threads.submit(call) for call in calls]]


def test_ten_registrations_of_one_name(crowded: Live, world: World) -> None:
    folders = [*world.folders, *world.folders[:2]]
    answers = at_once(*[lambda folder=folder: upload(crowded, folder, name="legal") for folder in folders])
    assert Counter(answer.status_code for answer in answers) == {201: CONTENTS, 200: 2}, [a.text for a in answers]
    numbers = {content_id(folder): answer.json()["version"] for folder, answer in zip(folders, answers, strict=True)}
    assert sorted(numbers.values()) == list(range(1, CONTENTS + 1))
    for content, number in numbers.items():
        assert_right(world, crowded.complete(**question(world, f"legal@{number}")), content)
    assert_nothing_left(crowded)


def test_ten_registrations_of_ten_names(crowded: Live, world: World) -> None:
    folders = [*world.folders, *world.folders[:2]]
    answers = at_once(*[lambda i=i: upload(crowded, folders[i], name=f"n{i}") for i in range(10)])
    assert [(answer.status_code, answer.json()["versions"]) for answer in answers] == [(201, [1])] * 10
    for index, folder in enumerate(folders):
        assert_right(world, crowded.complete(**question(world, f"n{index}")), content_id(folder))
    assert_nothing_left(crowded)


def question(world: World, name: str) -> dict[str, Any]:
    return {"prompt": world.prompts[0], "max_tokens": LENGTH, "adapter": name}


def assert_right(world: World, answer: Mapping[str, Any], content: str) -> None:
    assert answer["adapter"][0]["id"] == content
    assert answer["choices"][0]["text"] == world.answers[content, world.prompts[0]]


CHANGES: Mapping[str, tuple[str, Sequence[tuple[str, str, dict[str, Any] | None]], str | None]] = {
    "activated another": ("legal", [("POST", "adapters/legal/activate", {"version": 2})], "legal@2"),
    "deleted its version": (
        "legal@1",
        [("POST", "adapters/legal/activate", {"version": 2}), ("DELETE", "adapters/legal@1", None)],
        None,
    ),
    "deleted its adapter": ("legal@1", [("DELETE", "adapters/legal", None)], None),
    "alias means another": ("prod", [("PUT", "aliases/prod", {"targets": [{"adapter": "legal@2"}]})], "legal@2"),
    "alias and all deleted": ("prod", [("DELETE", "aliases/prod", None), ("DELETE", "adapters/legal", None)], None),
}
"""Requested name -> change -> version that serves the next request; None: a 404."""


@pytest.mark.parametrize("change", CHANGES)
def test_stream_keeps_its_version_during_replacement(crowded: Live, world: World, change: str) -> None:
    """Replacing and deleting a plain name are in ``test_adapters.py``."""
    name, steps, then = CHANGES[change]
    for folder in world.folders[:2]:
        upload(crowded, folder, name="legal").raise_for_status()
    crowded.http.post("/v1/adapters/legal/activate", json={"version": 1}).raise_for_status()
    crowded.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "legal"}]}).raise_for_status()
    if name != "prod":
        crowded.http.delete("/v1/aliases/prod").raise_for_status()
    expected = crowded.text(adapter=name, max_tokens=200)
    with crowded.http.stream("POST", "/v1/completions", json=request(adapter=name, max_tokens=200, stream=True)) as got:
        for method, path, body in steps:
            crowded.http.request(method, f"/v1/{path}", json=body).raise_for_status()
        pieces = events(got)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
    assert {piece["adapter"][0]["name"] for piece in pieces} == {"legal@1"}
    answer = crowded.http.post("/v1/completions", json=request(**question(world, name)))
    assert answer.status_code == (404 if then is None else 200)
    if then is not None:
        assert answer.json()["adapter"][0]["name"] == then
        assert_right(world, answer.json(), content_id(world.folders[1]))
    assert_nothing_left(crowded)


class Client:
    """A client that makes random requests and checks every response against the possible ones."""

    def __init__(self, live: Live, world: World, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._live = live
        self._world = world
        self._rng = random.Random(seed)
        self._http = httpx.Client(base_url=live.http.base_url, timeout=PATIENCE)

    def run(self, until: float) -> Counter[str]:
        """Make requests until ``until`` (monotonic time)."""
        deeds = {self._ask: 8, self._stream: 5, self._leave: 3, self._register: 3, self._activate: 3}
        deeds |= {self._pin: 1, self._alias: 2, self._no_alias: 1, self._delete: 1, self._delete_version: 2}
        with self._http:
            while time.monotonic() < until:
                (deed,) = self._rng.choices(list(deeds), list(deeds.values()))
                self.done[f"{deed.__name__} {deed()}"] += 1
        return self.done

    def _name(self) -> str:
        kinds = (self._rng.choice(NAMES), self._version(), self._rng.choice(ALIASES))
        return self._rng.choices(kinds, (4, 2, 2))[0]

    def _version(self) -> str:
        """Return a name that existed a moment ago, if any did."""
        entries = self._live.service.registry.entries()
        known = [version.name for entry in entries for version in entry.versions.values()]
        return self._rng.choice(known or [f"{NAMES[0]}@1"])

    def _question(self, **fields: Any) -> dict[str, Any]:
        name = {"adapter": self._name()} if self._rng.random() < 0.9 else {}
        return request(prompt=self._rng.choice(self._world.prompts), max_tokens=LENGTH, **name, **fields)

    def _ask(self) -> int:
        body = self._question()
        response = self._http.post("/v1/completions", json=body)
        if response.status_code == 200:
            self._check(body, [response.json()])
        return allowed(response, 200, 404)

    def _stream(self) -> int:
        body = self._question(stream=True)
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 200:
                lines = [line.removeprefix("data: ") for line in response.iter_lines() if line and line[0] != ":"]
                assert lines.pop() == "[DONE]"
                self._check(body, [httpx.Response(200, content=line).json() for line in lines])
            else:
                response.read()
        return allowed(response, 200, 404)

    def _leave(self) -> int:
        """Disconnect within a stream, or before its first piece."""
        with self._http.stream("POST", "/v1/completions", json=self._question(stream=True)) as response:
            lines = response.iter_lines()
            for _ in range(self._rng.randint(0, 6) if response.status_code == 200 else 0):
                next(lines)
            if response.status_code != 200:
                response.read()
        return allowed(response, 200, 404)

    def _check(self, body: Mapping[str, Any], pieces: Sequence[Mapping[str, Any]]) -> None:
        """Assert that one version served the whole stream, with that version's text."""
        served = pieces[0]["adapter"]
        assert all(piece["adapter"] == served for piece in pieces)
        asked = body.get("adapter")
        alias = asked if asked in ALIASES else None
        assert [each.get("alias") for each in served] == ([] if asked is None else [alias])
        if asked is not None and asked not in ALIASES:
            assert served[0]["name"] == asked or served[0]["name"].startswith(f"{asked}@")
        content = served[0]["id"] if served else ""
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        assert text == self._world.answers[content, body["prompt"]], (body, served)

    def _register(self) -> int:
        fields = {"activate": self._rng.choice(("true", "false")), "preload": self._rng.choice(("true", "false"))}
        name, folder = self._rng.choice(NAMES), self._rng.choice(self._world.folders)
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        response = self._http.post("/v1/adapters", data={"name": name, **fields}, files=files)
        if response.is_success:
            assert response.json()["version"] > 0
        return allowed(response, 200, 201, 409)

    def _activate(self) -> int:
        name, _, number = self._version().partition("@")
        response = self._http.post(f"/v1/adapters/{name}/activate", json={"version": int(number)})
        return allowed(response, 200, 404, 409)

    def _pin(self) -> int:
        body = {"pinned": self._rng.random() < 0.4}
        return allowed(self._http.post(f"/v1/adapters/{self._rng.choice(NAMES)}/pin", json=body), 200, 404, 409)

    def _alias(self) -> int:
        adapters = {self._version() for _ in range(self._rng.randint(0, 2))} or {self._rng.choice(NAMES)}
        targets = [{"adapter": adapter, "weight": 3} for adapter in adapters]
        response = self._http.put(f"/v1/aliases/{self._rng.choice(ALIASES)}", json={"targets": targets})
        return allowed(response, 200, 201, 404, 409)

    def _no_alias(self) -> int:
        return allowed(self._http.delete(f"/v1/aliases/{self._rng.choice(ALIASES)}"), 200, 404)

    def _delete(self) -> int:
        return allowed(self._http.delete(f"/v1/adapters/{self._rng.choice(NAMES)}"), 200, 404, 409)

    def _delete_version(self) -> int:
        return allowed(self._http.delete(f"/v1/adapters/{self._version()}"), 200, 404, 409)


def allowed(response: httpx.Response, *statuses: int) -> int:
    assert response.status_code in statuses, response.text
    return response.status_code


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_everything_at_once(crowded: Live, world: World, seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    for name in NAMES:
        upload(crowded, world.folders[0], name=name).raise_for_status()
    until = time.monotonic() + seconds
    clients = [Client(crowded, world, seed) for seed in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as threads:
        results = [threads.submit(client.run, until) for client in clients]
        done = sum((result.result() for result in results), Counter())
    sys.stdout.write(f"{dict(sorted(done.items()))}\n")
    for deed in ("_ask", "_stream", "_leave", "_register", "_activate", "_alias", "_delete", "_delete_version"):
        assert sum(done[f"{deed} {status}"] for status in (200, 201)), f"never succeeded: {deed}, {done}"
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not errors
    assert_nothing_left(crowded)
    for alias in ALIASES:
        crowded.http.delete(f"/v1/aliases/{alias}")
    for name in NAMES:
        crowded.http.delete(f"/v1/adapters/{name}")
    assert crowded.service.registry.names() == []
    assert_nothing_left(crowded)
    assert ids(crowded) == set()
