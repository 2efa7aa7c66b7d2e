"""Errors at start are reported before the base is loaded; and what a start logs."""

import gc
import logging
import socket
import sys
from pathlib import Path

import pytest

from bases.base import make_base
from bases.errors import ConfigError
from server.api import serve as serve_module
from server.api.serve import DrainingServer, log_environment, serve
from server.api.startup import open_resources, open_service
from server.config import Settings
from server.listener import bind
from tests.api.live import Live, running, tiny_service
from tests.tiny import tiny_model, tiny_tokenizer


def refused(message: str, **settings: object) -> None:
    """Check that a start ends with ``message``. The model does not exist, which is noticed when the base is loaded."""
    with pytest.raises(ConfigError, match=message):
        serve(Settings(**{"model": "/no/such/model", "port": 0, **settings}))


def test_the_model_is_loaded_last(tmp_path: Path) -> None:
    refused("--model: ", data_dir=tmp_path)
    refused("--model: ", data_dir=tmp_path)  # the first attempt has let go of the folder


def test_a_data_folder_in_use(live: Live) -> None:
    refused("--data-dir: another server keeps its adapters in", data_dir=live.service.settings.data_dir)


def test_a_data_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused("--data-dir: .* cannot be written", data_dir=tmp_path / "file")


def test_an_adapter_that_does_not_exist(tmp_path: Path) -> None:
    refused("--adapter: red=/no/such: there is no such folder", data_dir=tmp_path, adapter={"red": Path("/no/such")})
    refused("--adapter: .* cannot name an adapter", data_dir=tmp_path, adapter={"red@1": tmp_path})


def test_a_source_or_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    refused("--allow-source: ", data_dir=tmp_path, allow_source="ftp://host/folder")
    refused("--store-url: ", data_dir=tmp_path, store_url="no-such-protocol://bucket")


def test_unreachable_database(tmp_path: Path) -> None:
    database = "postgresql://user@127.0.0.1:9/registry"
    refused("--database-url: ", data_dir=tmp_path, store_url=f"file://{tmp_path}", database_url=database)


def test_port_taken_while_the_model_loads() -> None:
    with bind("127.0.0.1", 0) as loading, pytest.raises(ConfigError, match="--port: cannot listen"):
        bind("127.0.0.1", loading.getsockname()[1])


@pytest.mark.parametrize("host", ["..", "x" * 64])
def test_an_invalid_host(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host: .* is not an address of this machine: [A-Za-z]"):
        bind(host, 0)


def test_a_port_can_be_bound_again_at_once(tmp_path: Path) -> None:
    """A server that ends closes its connections, which then stay in TIME_WAIT for about a minute."""
    with running(tiny_service(tmp_path)) as live:
        port = live.http.base_url.port
        assert port is not None
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while client.recv(4096):
            pass
        client.close()
    with pytest.raises(OSError, match="in use"), socket.socket() as plain:
        plain.bind(("127.0.0.1", port))
    with bind("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


def test_a_key_of_clients_in_the_environment_is_logged_as_unused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MANYLORA_API_KEY", raising=False)
    with caplog.at_level(logging.INFO):
        log_environment()
        assert not caplog.records
        monkeypatch.setenv("MANYLORA_API_KEY", "sesame")
        log_environment()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Keys that this server accepts are given in MANYLORA_API_KEYS" in caplog.text
    assert "sesame" not in caplog.text


def test_ignored_variables_of_kubernetes_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MANYLORA_API_KEY", raising=False)
    monkeypatch.setenv("MANYLORA_SERVICE_HOST", "10.0.0.1")
    with caplog.at_level(logging.INFO):
        log_environment()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.messages[0].endswith("Kubernetes service links and not options: MANYLORA_SERVICE_HOST")


def test_the_size_of_the_kv_cache_is_printed(tmp_path: Path) -> None:
    said: list[str] = []
    settings = Settings(data_dir=tmp_path, quantization="none", dtype="fp32", device="cpu", threads=1)
    open_service(make_base(tiny_model(), tiny_tokenizer(), "tiny"), settings, said.append).close()
    assert [line.partition(" (auto: ")[0] for line in said] == ["keys and values: 4.0 MiB, 8192 tokens"]


def test_a_database_without_its_driver_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    settings = Settings(
        data_dir=tmp_path, store_url=f"file://{tmp_path}/store", database_url="postgresql://u@127.0.0.1/x"
    )
    with pytest.raises(ConfigError) as raised:
        open_resources(settings)
    assert str(raised.value) == (
        '--database-url: needs a package that is not installed (psycopg); run: pip install "manylora[postgres]"'
    )


def test_what_the_start_made_is_kept_from_the_garbage_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = DrainingServer.run, []

    def drained(server: DrainingServer, sockets: list[socket.socket]) -> None:
        kept.append(gc.get_freeze_count())
        server.drain()
        run(server, sockets)

    monkeypatch.setattr(serve_module, "load_base", lambda *_: make_base(tiny_model(), tiny_tokenizer(), "tiny"))
    monkeypatch.setattr(DrainingServer, "run", drained)
    plain = {"quantization": "none", "dtype": "fp32", "device": "cpu", "kv_memory_gib": 0.01, "threads": 1}
    try:
        serve(Settings(port=0, data_dir=tmp_path, **plain))
    finally:
        gc.unfreeze()
    assert kept[0] > 100_000
