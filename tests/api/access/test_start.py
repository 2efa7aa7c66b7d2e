"""Which servers start without keys, and where keys come from."""

import logging
from contextlib import closing
from pathlib import Path

import pytest

import manylora
from bases.errors import ConfigError
from server.access.key_file import VARIABLE
from server.access.key_spec import KeySpec
from server.access.key_store import KeyStore
from server.api.serve import serve
from server.config import Settings
from server.database import open_database
from server.doctor import problems
from server.listener import bind, is_local
from tests.api.access.conftest import client
from tests.api.live import running, tiny_service, wait_for

SECRET = "0123456789abcdef"


def reason(data_dir: Path, **settings: object) -> str:
    """Return why a start ends: for its keys, or for the model, which does not exist and is loaded after that."""
    with pytest.raises(ConfigError) as raised:
        serve(Settings(**{"model": "/no/such/model", "port": 0, "data_dir": data_dir, **settings}))
    return str(raised.value)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_other_machines_need_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = reason(tmp_path, host="0.0.0.0")
    assert refused.startswith("--host: other machines reach 0.0.0.0, and there are no API keys")
    for way in ("manylora keys add NAME", "--api-key-file", "--allow-anonymous"):
        assert way in refused
    assert reason(tmp_path, host="127.0.0.1").startswith("--model: ")
    assert reason(tmp_path, host="localhost").startswith("--model: ")
    file = tmp_path / "keys"
    file.write_text(SECRET)
    assert reason(tmp_path, host="0.0.0.0", api_key_file=file).startswith("--model: ")
    with monkeypatch.context() as context:
        context.setenv(VARIABLE, SECRET)
        assert reason(tmp_path, host="0.0.0.0").startswith("--model: ")
    with closing(open_database(tmp_path, None)) as database:
        stored, _ = KeyStore(database).add(KeySpec(name="a"))
        KeyStore(database).revoke(stored.key.id)
    assert reason(tmp_path, host="0.0.0.0").startswith("--model: "), "a server whose keys are revoked serves nobody"


def test_a_server_for_everybody_is_asked_for_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert reason(tmp_path, host="0.0.0.0", allow_anonymous=True).startswith("--model: ")
    assert "everybody who reaches 0.0.0.0 may use and change this server" in caplog.text


def test_the_doctor_says_so_too(tmp_path: Path) -> None:
    def found(**settings: object) -> list[str]:
        return [line for line in problems(Settings(data_dir=tmp_path, port=0, **settings)) if "key" in line]

    assert found(host="0.0.0.0") == [reason(tmp_path / "other", host="0.0.0.0")]
    assert found() == found(host="0.0.0.0", allow_anonymous=True) == []
    (tmp_path / "keys").write_text("short")
    (line,) = found(api_key_file=tmp_path / "keys")
    assert line.startswith(f"--api-key-file: {tmp_path}/keys, line 1: ")


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_local_addresses(host: str, local: bool) -> None:
    with bind(host, 0) as listener:
        assert is_local(listener) is local


def test_a_bad_file_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{SECRET}\nshort\n")
    assert reason(tmp_path, api_key_file=file).startswith(f"--api-key-file: {file}, line 2: ")
    assert reason(tmp_path, api_key_file="/no/such").startswith("--api-key-file: /no/such cannot be read")


def test_keys_without_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment, of a file, and of the command line while the server runs."""
    file = tmp_path / "keys"
    file.write_text(f"- {{name: acme, secret: {SECRET}, adapters: [acme/*]}}")
    monkeypatch.setenv(VARIABLE, f"ops {SECRET[::-1]}")
    with running(tiny_service(tmp_path, api_key_file=file)) as live:
        assert live.http.get("/v1/models").status_code == 401
        with client(live, SECRET) as acme, client(live, SECRET[::-1]) as ops:
            assert acme.get("/v1/models").status_code == 200
            assert acme.get("/metrics").status_code == 403
            assert ops.get("/metrics").status_code == 200
            assert ops.get("/v1/keys").json()["data"] == [], "those of the database only"


def test_keys_of_the_command_line_reach_a_server_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tiny_service(tmp_path)) as live:
        data = str(live.service.settings.data_dir)
        assert live.http.get("/v1/models").status_code == 200
        assert manylora.main(["keys", "add", "ops", "--scope", "admin", "--data-dir", data]) == 0
        secret = capsys.readouterr().out.split()[-1]
        wait_for(lambda: live.http.get("/v1/models").status_code == 401)
        with client(live, secret) as ops:
            assert ops.get("/v1/keys").json()["data"][0]["name"] == "ops"
            assert manylora.main(["keys", "revoke", "ops", "--data", data]) == 0
            wait_for(lambda: ops.get("/v1/models").status_code == 401)
