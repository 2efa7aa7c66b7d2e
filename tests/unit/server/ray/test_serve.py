"""What ``manylora ray`` asks of Ray, without a cluster. Needs Ray, which not every environment has."""

import asyncio
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from server.access.key_file import VARIABLE
from server.ray.settings import make_ray_settings

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own modules

SECRET = "sk-a-secret-of-the-environment"


def settings(**given: Any) -> Any:
    return make_ray_settings({"model": "base", **given})


def test_keys_of_the_environment_are_an_argument_that_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.ray.application import build, environment_keys

    monkeypatch.setenv(VARIABLE, SECRET)
    keys = environment_keys()
    assert keys is not None
    assert keys.get_secret_value() == SECRET
    engines = build(settings())._bound_deployment.init_args[1]._bound_deployment
    assert engines.init_args[1] == keys
    assert SECRET not in f"{engines!r} {engines.init_args!r} {engines.ray_actor_options!r}"
    monkeypatch.delenv(VARIABLE)
    assert environment_keys() is None


def test_options_that_ray_serve_would_ignore_are_named() -> None:
    from server.ray.serve import differences, http_options

    there = http_options(settings(host="127.0.0.1"), 8000)
    assert differences(http_options(settings(host="127.0.0.1"), 8000), there) == ""
    other = http_options(settings(host="127.0.0.1", keep_alive_seconds=7), 9000)
    assert differences(other, there).startswith("--port 8000 (not 9000), --keep-alive-seconds ")


def test_replicas_that_cannot_be_ranked_are_all_candidates(caplog: pytest.LogCaptureFixture) -> None:
    from server.ray.router import AdapterRouter

    router = object.__new__(AdapterRouter)  # without a policy, so that ranking fails
    replicas: list[Any] = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=id_)) for id_ in "ab"]
    with caplog.at_level(logging.ERROR):
        assert asyncio.run(router.choose_replicas(replicas)) == [[replica] for replica in replicas]
    assert "could not be ranked" in caplog.text


class Cluster:
    """Ray Serve as ``end`` sees it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.done: list[str] = []

    def delete(self, name: str, _blocking: bool) -> None:
        assert not _blocking
        self.done.append("delete")

    def status(self) -> Any:
        self.looks -= 1
        return SimpleNamespace(applications={"manylora": None} if self.looks > 0 else {})

    def shutdown(self) -> None:
        self.done.append("shutdown")


@pytest.mark.parametrize(
    ("looks", "seconds", "signalled", "shuts_down"),
    [(3, 60, False, True), (1000, 60, True, False), (1000, 0.1, False, True)],
    ids=["drained", "second signal", "late"],
)
def test_running_requests_get_their_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch, looks: int, seconds: float, signalled: bool, shuts_down: bool
) -> None:
    from server.ray import serve

    cluster, forced = Cluster(looks), threading.Event()
    monkeypatch.setattr(serve, "ray_serve", cluster)
    if signalled:
        forced.set()
    serve.end(seconds, forced)
    assert cluster.done == ["delete", *["shutdown"] * shuts_down]
