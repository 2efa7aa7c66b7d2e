"""Names by which a server without keys may be called: not by those of web pages (DNS rebinding)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import openai
import pytest

from bases.errors import ConfigError
from server.access.key_spec import KeySpec
from server.config import Settings
from server.listener import bind
from tests.api.access.conftest import client
from tests.api.live import Live, request, running, tiny_service

NAME = "models.example.com"


@pytest.fixture(scope="module")
def named(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    adapter = {"red": folders["red"]}
    with running(tiny_service(tmp_path_factory.mktemp("named"), adapter=adapter, allowed_host=(NAME,))) as live:
        yield live


def port(live: Live) -> int:
    return live.http.base_url.port or 80


@pytest.mark.parametrize("host", ["evil.example.com", "localhost.evil.example.com", "127.0.0.1.evil.example.com", "x"])
def test_a_page_that_makes_its_name_point_here_is_refused(named: Live, host: str) -> None:
    """Nothing in such a request but the name tells it from one of the server's own pages."""
    headers = {"host": f"{host}:{port(named)}", "sec-fetch-site": "same-origin"}
    for method, path, body in (
        ("POST", "/v1/completions", request()),
        ("DELETE", "/v1/adapters/red", None),
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
    ):
        answer = named.http.request(method, path, json=body, headers=headers)
        assert answer.status_code == 403, answer.text
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "host_not_allowed")
        assert host in error["message"]
        assert "--allowed-host" in error["message"]
    anthropic = named.http.post("/v1/messages", json={}, headers=headers)
    assert (anthropic.status_code, anthropic.json()["type"]) == (403, "error")
    assert named.http.get("/v1/adapters/red").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:{port}", "localhost", "localhost.", "LOCALHOST:{port}", "[::1]:{port}"),
        *("[fe80::1%25eth0]", "192.168.1.7:80", NAME, f"{NAME}:8443", "Models.Example.com"),
    ],
)
def test_addresses_localhost_and_given_names_are_served(named: Live, host: str) -> None:
    headers = {"host": host.format(port=port(named))}
    assert named.http.get("/v1/models", headers=headers).status_code == 200


def test_clients_need_nothing_for_that(named: Live) -> None:
    for url in (f"http://127.0.0.1:{port(named)}/v1", f"http://localhost:{port(named)}/v1"):
        assert httpx.get(f"{url}/models").status_code == 200
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as of_openai:
            assert of_openai.models.list().data


def test_a_server_on_the_loopback_address_of_ipv6(tmp_path: Path) -> None:
    try:
        bind("::1", 0).close()
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with running(tiny_service(tmp_path, host="::1")) as live:
        assert str(live.http.base_url).startswith("http://[::1]:")
        assert live.http.get("/v1/models").status_code == 200
        assert live.http.get("/v1/models", headers={"host": NAME}).status_code == 403


def test_any_name_may_be_allowed(tmp_path: Path) -> None:
    with running(tiny_service(tmp_path, allowed_host=("*",))) as live:
        assert live.http.get("/v1/models", headers={"host": "evil.example.com"}).status_code == 200


def test_with_keys_the_name_does_not_matter(tmp_path: Path) -> None:
    with running(tiny_service(tmp_path)) as live:
        _, secret = live.service.keyring.store.add(KeySpec(name="ops"))
        with client(live, secret) as ops:
            assert ops.get("/v1/models", headers={"host": "evil.example.com"}).status_code == 200
        assert live.http.get("/v1/models", headers={"host": "evil.example.com"}).status_code == 401


def test_a_server_for_other_machines_has_names_that_it_does_not_know(tmp_path: Path) -> None:
    """Everybody who reaches it may use it: --allow-anonymous says so."""
    with running(tiny_service(tmp_path, host="0.0.0.0", allow_anonymous=True)) as live:
        assert live.http.get("/v1/models", headers={"host": NAME}).status_code == 200


@pytest.mark.parametrize("name", ["http://models.example.com", "models.example.com:80", "a b", "*.example.com", ""])
def test_what_is_no_name_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--allowed-host: must be \* or a name such as"):
        Settings(data_dir=tmp_path, allowed_host=(name,))
