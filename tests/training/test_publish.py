"""Publishing to a running server: versions, an alias, and what is told before and after a failure."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from bases.errors import ConfigError
from tests.api.live import Live, running, tiny_service, unchanged
from tests.tiny import save_adapter, tiny_model
from tests.training.tiny_run import tiny_settings
from tests.training.tiny_server import address, serving
from training.base import open_base
from training.publish import PublishFailed, Server, check_names, check_server, publish


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def fingerprint(root: Path) -> str:
    return open_base(tiny_settings(root)).layout.fingerprint


@pytest.fixture(scope="module")
def live(root: Path) -> Iterator[Live]:
    with serving(tiny_settings(root), root / "served") as live:
        yield live


def at(live: Live) -> Server:
    return Server(address(live))


def adapter(folder: Path, seed: int, **origin: str) -> Path:
    save_adapter(tiny_model(), folder, seed, r=2, target_modules=["q_proj"])
    (folder / "manylora.json").write_text(json.dumps(origin))
    return folder


def test_the_next_version_and_an_alias_for_exactly_it(live: Live, tmp_path: Path, fingerprint: str) -> None:
    said: list[str] = []
    sent: list[tuple[int, int]] = []
    folders = [adapter(tmp_path / str(seed), seed, base_fingerprint=fingerprint) for seed in (1, 2)]
    publish(at(live), folders[0], "two", None, said.append)
    second = publish(at(live), folders[1], "two", "prod", said.append, lambda done, all: sent.append((done, all)))
    assert (second.version, second.new, second.alias) == ("two@2", True, "prod")
    assert said == ["published as two@1; two means two@1", "published as two@2; two means two@2", "prod means two@2"]
    assert sent[-1][0] == sent[-1][1] > 0
    card = live.http.get("/v1/aliases/prod").json()
    assert [(target["adapter"], target["serves"]) for target in card["targets"]] == [("two@2", "two@2")]
    again = publish(at(live), folders[1], "two", None, said.append)
    assert (again.version, again.new) == ("two@2", False)
    assert said[-1].startswith("two@2 has this content already")


def test_a_refusal_in_the_servers_words_changes_nothing(live: Live, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "other", 3, base_fingerprint="f" * 64)
    with (
        unchanged(live),
        pytest.raises(PublishFailed, match=r"not published: .*trained on the base ffff.*the adapter is in .*other"),
    ):
        publish(at(live), folder, "refused", "prod")


def test_an_alias_that_cannot_be_is_told_with_the_version_that_is_there(
    live: Live, tmp_path: Path, fingerprint: str
) -> None:
    """The upload went well, so the message must say what is left to do."""
    folder = adapter(tmp_path / "a", 4, base_fingerprint=fingerprint)
    said: list[str] = []
    with pytest.raises(PublishFailed, match="three@1 is published, but three does not mean it"):
        publish(at(live), folder, "three", "three", said.append)
    assert said == ["published as three@1; three means three@1"]


def test_a_server_of_the_same_base_is_found_fit(live: Live, fingerprint: str) -> None:
    check_server(at(live), fingerprint)
    check_server(Server(f"{address(live)}/"), fingerprint)


def test_a_server_of_another_base_is_told_before_training(live: Live, tmp_path: Path, fingerprint: str) -> None:
    with running(tiny_service(tmp_path)) as other, pytest.raises(ConfigError, match=r"serves another base \(fp_"):
        check_server(at(other), fingerprint)


def test_names_that_are_taken_are_told_before_training(live: Live, tmp_path: Path, fingerprint: str) -> None:
    folder = adapter(tmp_path / "a", 5, base_fingerprint=fingerprint)
    publish(at(live), folder, "four", "quatre")
    with pytest.raises(ConfigError, match=r"^--name: quatre is an alias on that server"):
        check_names(at(live), "quatre", None)
    with pytest.raises(ConfigError, match=r"^--alias: four is an adapter on that server"):
        check_names(at(live), "new", "four")
    check_names(at(live), "four", "quatre")
    check_names(Server(f"{address(live)}/v1"), "quatre", "four")


def test_nobody_answers(fingerprint: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"--publish: no answer from http://127.0.0.1:.*refused"):
            check_server(Server(url), fingerprint)


def test_something_else_answers(live: Live, fingerprint: str) -> None:
    with pytest.raises(ConfigError, match="GET /v1/v1/models is answered with 404"):
        check_server(Server(f"{address(live)}/v1"), fingerprint)


class Keeper(BaseHTTPRequestHandler):
    """A proxy that lets nobody through, and keeps the keys it was shown."""

    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers["authorization"])
        self.send_response(401)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Not to stderr."""


def test_the_key_is_shown_when_asking_and_when_publishing(tmp_path: Path, fingerprint: str) -> None:
    folder = adapter(tmp_path / "a", 4, base_fingerprint=fingerprint)
    with ThreadingHTTPServer(("127.0.0.1", 0), Keeper) as keeper:
        thread = threading.Thread(target=keeper.serve_forever)
        thread.start()
        server = Server(f"http://127.0.0.1:{keeper.server_port}", "sesame")
        try:
            with pytest.raises(ConfigError, match="GET /v1/models is answered with 401") as refused:
                check_server(server, fingerprint)
            with pytest.raises(PublishFailed, match="not published") as failed:
                publish(server, folder, "a", None)
        finally:
            keeper.shutdown()
            thread.join()
    assert Keeper.keys == ["Bearer sesame"] * 2
    assert "sesame" not in f"{refused.value} {failed.value}"


@pytest.mark.parametrize("url", ["http://", "http://[", "https:///x"])
def test_what_is_no_address(url: str, fingerprint: str) -> None:
    with pytest.raises(ConfigError, match="--publish: "):
        check_server(Server(url), fingerprint)
