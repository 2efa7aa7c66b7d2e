"""Publishing to a running server: versions, an alias, and error messages before and after training."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from adapters.format.spec import BaseLayout
from bases.errors import ConfigError
from tests.api.live import Live, running, tiny_service, unchanged
from tests.tiny import save_adapter, tiny_model
from tests.training.tiny_run import tiny_settings
from tests.training.tiny_server import address, serving
from training.model.base import open_base
from training.publish.publish import PublishFailed, PublishTarget, check_base, check_names, publish, served_base


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def layout(root: Path) -> BaseLayout:
    return open_base(tiny_settings(root)).layout


@pytest.fixture(scope="module")
def fingerprint(layout: BaseLayout) -> str:
    return layout.fingerprint


@pytest.fixture(scope="module")
def live(root: Path) -> Iterator[Live]:
    with serving(tiny_settings(root), root / "served") as live:
        yield live


def at(live: Live) -> PublishTarget:
    return PublishTarget(address(live))


def adapter(folder: Path, seed: int, **origin: str) -> Path:
    save_adapter(tiny_model(), folder, seed, r=2, target_modules=["q_proj"])
    (folder / "manylora.json").write_text(json.dumps(origin))
    return folder


def test_publish_adds_a_version_and_sets_the_alias(live: Live, tmp_path: Path, fingerprint: str) -> None:
    said: list[str] = []
    sent: list[tuple[int, int]] = []
    folders = [adapter(tmp_path / str(seed), seed, base_fingerprint=fingerprint) for seed in (1, 2)]
    publish(at(live), folders[0], "two", None, said.append)
    second = publish(at(live), folders[1], "two", "prod", said.append, lambda done, all: sent.append((done, all)))
    assert (second.version, second.new, second.alias) == ("two@2", True, "prod")
    assert said == [
        "published as two@1; two now serves two@1",
        "published as two@2; two now serves two@2",
        "the alias prod now points to two@2",
    ]
    assert sent[-1][0] == sent[-1][1] > 0
    card = live.http.get("/v1/aliases/prod").json()
    assert [(target["adapter"], target["serves"]) for target in card["targets"]] == [("two@2", "two@2")]
    again = publish(at(live), folders[1], "two", None, said.append)
    assert (again.version, again.new) == ("two@2", False)
    assert said[-1].startswith("two@2 has this content already")


def test_refusal_has_the_servers_message_and_changes_nothing(live: Live, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "other", 3, base_fingerprint="f" * 64)
    with (
        unchanged(live),
        pytest.raises(PublishFailed, match=r"not published: .*trained on the base ffff.*the adapter is in .*other"),
    ):
        publish(at(live), folder, "refused", "prod")


def test_failed_alias_is_reported_with_the_published_version(live: Live, tmp_path: Path, fingerprint: str) -> None:
    """The upload went well, so the message must say what is left to do."""
    folder = adapter(tmp_path / "a", 4, base_fingerprint=fingerprint)
    said: list[str] = []
    with pytest.raises(PublishFailed, match="three@1 is published, but the alias three could not be set"):
        publish(at(live), folder, "three", "three", said.append)
    assert said == ["published as three@1; three now serves three@1"]


def test_server_with_the_same_base_passes_without_generating(live: Live, layout: BaseLayout) -> None:
    before = live.service.engine.stats()
    for url in (address(live), f"{address(live)}/"):
        served = served_base(PublishTarget(url))
        assert served == layout.fingerprint
        check_base(PublishTarget(url), served, layout)
    after = live.service.engine.stats()
    assert (after.output_tokens, after.prompt_tokens) == (before.output_tokens, before.prompt_tokens)


def test_server_with_an_equivalent_fingerprint_passes(layout: BaseLayout) -> None:
    old = replace(layout, equivalents=frozenset({"e" * 64}))
    check_base(PublishTarget("http://nowhere"), "e" * 64, old)
    check_base(PublishTarget("http://nowhere"), None, old)
    with pytest.raises(ConfigError, match=r"serves another base \(fp_dddddddddddd\)"):
        check_base(PublishTarget("http://nowhere"), "d" * 64, old)


def test_server_with_another_base_is_reported_before_training(tmp_path: Path, layout: BaseLayout) -> None:
    with running(tiny_service(tmp_path)) as other, pytest.raises(ConfigError, match=r"serves another base \(fp_"):
        check_base(at(other), served_base(at(other)), layout)


def test_taken_names_are_reported_before_training(live: Live, tmp_path: Path, fingerprint: str) -> None:
    folder = adapter(tmp_path / "a", 5, base_fingerprint=fingerprint)
    publish(at(live), folder, "four", "quatre")
    with pytest.raises(ConfigError, match=r"^--name: quatre is an alias on that server"):
        check_names(at(live), "quatre", None)
    with pytest.raises(ConfigError, match=r"^--alias: four is an adapter on that server"):
        check_names(at(live), "new", "four")
    check_names(at(live), "four", "quatre")
    check_names(PublishTarget(f"{address(live)}/v1"), "quatre", "four")


def test_unreachable_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"--publish: no answer from http://127.0.0.1:.*refused"):
            served_base(PublishTarget(url))


def test_other_http_servers(live: Live) -> None:
    with pytest.raises(ConfigError, match=r"http://.* answers GET /v1/v1/models with status 404"):
        served_base(PublishTarget(f"{address(live)}/v1"))


class Scripted(BaseHTTPRequestHandler):
    """Sends the next response of each path; repeats the last one."""

    answers: ClassVar[dict[str, list[tuple[int, str]]]] = {}

    def do_GET(self) -> None:
        left = self.answers[self.path]
        status, text = left.pop(0) if len(left) > 1 else left[0]
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def scripted(**answers: list[tuple[int, str]]) -> Iterator[PublishTarget]:
    Scripted.answers = {{"models": "/v1/models", "version": "/version"}[name]: each for name, each in answers.items()}
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield PublishTarget(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


MODELS = (200, '{"data": []}')
VERSION = (200, '{"base_fingerprint": "abc"}')


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.publish.publish.RETRY_SECONDS", 0.01)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for(impatient: None, status: int) -> None:
    said: list[str] = []
    busy = (status, "later")
    with scripted(models=[busy, busy, MODELS], version=[busy, VERSION]) as server:
        assert served_base(server, said.append) == "abc"
    assert [f"is busy or starting ({status}); waiting" in line for line in said] == [True, True]


def test_server_that_stays_busy_is_reported(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.publish.publish.BUSY_TIMEOUT_SECONDS", 0.05)
    with (
        scripted(models=[(503, "")], version=[VERSION]) as server,
        pytest.raises(ConfigError, match=r"is busy or starting \(503\); try again later"),
    ):
        served_base(server)


def test_server_without_a_fingerprint_checks_at_the_upload() -> None:
    with scripted(models=[MODELS], version=[(404, "")]) as server:
        assert served_base(server) is None
    with scripted(models=[MODELS], version=[(200, '{"version": "0.1"}')]) as server:
        assert served_base(server) is None


def test_server_without_a_model_list_is_refused() -> None:
    for text in ("hello", "[]", '{"data": 1}'):
        with (
            scripted(models=[(200, text)], version=[VERSION]) as server,
            pytest.raises(ConfigError, match="is not a model server"),
        ):
            served_base(server)


class Keeper(BaseHTTPRequestHandler):
    """A proxy that refuses everything, and records the keys it gets."""

    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers["authorization"])
        self.send_response(401)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_key_is_sent_with_checks_and_uploads(tmp_path: Path, fingerprint: str) -> None:
    folder = adapter(tmp_path / "a", 4, base_fingerprint=fingerprint)
    with ThreadingHTTPServer(("127.0.0.1", 0), Keeper) as keeper:
        thread = threading.Thread(target=keeper.serve_forever)
        thread.start()
        server = PublishTarget(f"http://127.0.0.1:{keeper.server_port}", "sesame")
        try:
            with pytest.raises(
                ConfigError, match=r"answers GET /v1/models with status 401; set a valid API key "
            ) as refused:
                served_base(server)
            with pytest.raises(PublishFailed, match="not published") as failed:
                publish(server, folder, "a", None)
        finally:
            keeper.shutdown()
            thread.join()
    assert Keeper.keys == ["Bearer sesame"] * 2
    assert "sesame" not in f"{refused.value} {failed.value}"


@pytest.mark.parametrize("url", ["http://", "http://[", "https:///x"])
def test_invalid_address(url: str) -> None:
    with pytest.raises(ConfigError, match="--publish: "):
        served_base(PublishTarget(url))
