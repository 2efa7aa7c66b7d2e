"""Settings: the command line, the environment, and one clear line for each bad value."""

from pathlib import Path

import pytest

import manylora
from bases import machine
from bases.errors import ConfigError
from server.config import Settings, read_settings
from server.environment import service_links


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MANYLORA_{name.upper()}", raising=False)
    monkeypatch.delenv("MANYLORA_DATA", raising=False)


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = Settings()
    assert (settings.model, settings.host, settings.port) == ("demo", "127.0.0.1", 8000)
    assert settings.data_dir == tmp_path / "manylora"
    assert settings.adapter == {}


def test_constructor_does_not_read_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["manylora", "--port", "1"])
    assert Settings().port == 8000


def test_every_option_has_a_flag_and_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {
        "model": "x",
        "host": "::1",
        "port": "0",
        "data_dir": str(tmp_path),
        "device": "cpu",
        "quantization": "none",
        "dtype": "fp32",
        "chat_template": str(tmp_path / "own.jinja"),
        "tool_parser": "hermes",
        "adapter": "a=/x",
        "adapter_root": str(tmp_path),
        "adapter_dir": str(tmp_path),
        "allow_source": "hf://org,s3://bucket/team",
        "fetch_on_request": "true",
        "store_url": "s3://bucket/adapters",
        "database_url": "postgresql://user@host/registry",
        "store_quota_gib": "7",
        "store_cache_gib": "3",
        "max_device_adapters": "3",
        "max_rank": "9",
        "device_ranks": "48",
        "host_cache_gib": "0.5",
        "cpu": "avx2",
        "kv_memory_gib": "0.25",
        "block_size": "8",
        "max_batch_sequences": "5",
        "max_batch_tokens": "7",
        "max_model_len": "99",
        "max_queue": "11",
        "max_queue_tokens": "1200",
        "max_wait_seconds": "1.5",
        "share_prefixes": "true",
        "speculation": "off",
        "generation_config": "off",
        "pooling": "mean",
        "step_timeout": "45.5",
        "drain_seconds": "2.5",
        "drain_delay_seconds": "1.5",
        "keep_alive_seconds": "620",
        "api_key_file": str(tmp_path / "keys"),
        "allow_anonymous": "true",
        "allowed_host": "models.example.com",
        "history_days": "400",
        "request_timeout_seconds": "10",
        "write_timeout_seconds": "20",
        "max_connections": "100",
        "max_connections_per_address": "10",
        "tls_cert": str(tmp_path / "tls.crt"),
        "tls_key": str(tmp_path / "tls.key"),
        "cors_origin": "https://chat.example.com,http://localhost:3000",
        "forwarded_allow_ips": "10.0.0.0/8,::1",
        "lenient": "true",
        "no_page": "true",
        "runs": str(tmp_path / "runs"),
        "max_body_mib": "0.1",
        "threads": "1",
        "log_level": "debug",
        "log_format": "json",
        "log_prompts": "true",
        "metrics_adapters": "17",
    }
    assert values.keys() == Settings.model_fields.keys()
    flags = [(f"--{name.replace('_', '-')}", *([] if value == "true" else [value])) for name, value in values.items()]
    by_flags = read_settings([word for flag in flags for word in flag])
    for name, value in values.items():
        monkeypatch.setenv(f"MANYLORA_{name.upper()}", value)
    assert Settings() == by_flags
    assert by_flags.adapter == {"a": Path("/x")}
    assert by_flags != Settings(port=1)


def test_a_shared_database_needs_a_shared_store() -> None:
    with pytest.raises(ConfigError, match="--database-url: needs --store-url"):
        read_settings(["--database-url", "postgresql://user:secret@host/registry"])


def test_a_database_password_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"--database-url: must begin with postgresql://$"):
        read_settings(["--store-url", "file:///x", "--database-url", "mysql://user:secret@host/registry"])
    settings = read_settings(["--store-url", "file:///x", "--database-url", "postgresql://user:secret@host/registry"])
    assert "secret" not in repr(settings)


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_PORT", "1")
    assert read_settings([]).port == 1
    assert read_settings(["--port", "2"]).port == 2


def test_the_earlier_name_of_the_data_folder_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``--data`` and MANYLORA_DATA, the names in earlier versions."""
    assert read_settings(["--data", str(tmp_path / "flag")]).data_dir == tmp_path / "flag"
    monkeypatch.setenv("MANYLORA_DATA", str(tmp_path / "old"))
    assert read_settings([]).data_dir == tmp_path / "old"
    monkeypatch.setenv("MANYLORA_DATA_DIR", str(tmp_path / "new"))
    assert read_settings([]).data_dir == tmp_path / "new"


def test_adapters_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"a/b": Path("/x y"), "c": Path("/z=1")}
    assert read_settings(["--adapter", "a/b=/x y", "--adapter", "c=/z=1"]).adapter == expected
    monkeypatch.setenv("MANYLORA_ADAPTER", "a/b=/x y,c=/z=1")
    assert Settings().adapter == expected


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("*", "*"),
        ("https://Chat.example.com/", "https://chat.example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("https://chat.example.com:443", "https://chat.example.com"),
        ("http://[::1]:80/", "http://[::1]"),
        ("http://localhost:443", "http://localhost:443"),
    ],
)
def test_origins(given: str, read: str) -> None:
    assert read_settings(["--cors-origin", given]).cors_origin == (read,)


@pytest.mark.parametrize(
    "origin",
    ["chat.example.com", "https://chat.example.com/page", "https://", "null", "https://*.example.com", "http://x:*"],
)
def test_invalid_origins(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"^--cors-origin: must be \* or an origin such as https://"):
        read_settings(["--cors-origin", "*", "--cors-origin", origin])


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_PROT", "1")
    with pytest.raises(ConfigError, match=r"^MANYLORA_PROT: there is no such option$"):
        read_settings([])


LINKS = {
    "MANYLORA_PORT": "tcp://10.0.0.1:8000",
    "MANYLORA_SERVICE_HOST": "10.0.0.1",
    "MANYLORA_SERVICE_PORT": "8000",
    "MANYLORA_SERVICE_PORT_HTTP": "8000",
    "MANYLORA_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "MANYLORA_PORT_8000_TCP_ADDR": "10.0.0.1",
    "MANYLORA_PORT_8000_TCP_PORT": "8000",
    "MANYLORA_PORT_8000_TCP_PROTO": "tcp",
    "MANYLORA_GPU_PORT": "tcp://10.0.0.2:8000",
    "MANYLORA_GPU_SERVICE_HOST": "10.0.0.2",
}
"""Variables that Kubernetes sets in each pod of a namespace with services named manylora and manylora-gpu."""


def test_variables_that_kubernetes_sets_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    assert read_settings([]).port == 8000
    assert read_settings(["--port", "9"]).port == 9
    assert service_links() == sorted(LINKS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MANYLORA_GPU_PORT", "8000"),
        ("MANYLORA_SERVICE_HOSTS", "10.0.0.1"),
        ("MANYLORA_PORT_TCP", "x"),
        ("MANYLORA_URLS", "tcp://10.0.0.1:8000"),
    ],
)
def test_other_unknown_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name}: there is no such option$"):
        read_settings([])


def test_a_port_that_is_a_url_is_refused_unless_kubernetes_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--port: must be a whole number"):
        read_settings(["--port", "tcp://10.0.0.1:8000"])
    monkeypatch.setenv("MANYLORA_PORT", "http://10.0.0.1:8000")
    with pytest.raises(ConfigError, match="--port: must be a whole number"):
        read_settings([])


def test_kv_memory_may_be_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings([]).kv_memory_gib is None
    assert read_settings(["--kv-memory-gib", "auto"]).kv_memory_gib is None
    monkeypatch.setenv("MANYLORA_KV_MEMORY_GIB", "auto")
    assert read_settings([]).kv_memory_gib is None
    assert read_settings(["--kv-memory-gib", "0.5"]).kv_memory_gib == 0.5


def test_threads_default_to_the_usable_cores() -> None:
    assert Settings().cpu_threads == machine.usable_cores()
    assert Settings(threads=7).cpu_threads == 7


def test_an_empty_variable_is_refused_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_ADAPTER_ROOT", "")
    with pytest.raises(ConfigError, match="--adapter-root: must not be empty"):
        read_settings([])


def test_an_adapter_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_settings(["--adapter", "a=~/x"]).adapter == {"a": tmp_path / "x"}


def test_without_a_home_folder_the_error_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ConfigError, match="--data-dir: this user has no home folder"):
        read_settings([])


def test_ctrl_c_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.api.serve.serve", interrupted)
    assert manylora.main(["serve"]) == 130


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-rank", "0"], "--max-rank: must be at least 1 (got '0')"),
        (["--max-rank", "257"], "--max-rank: must be at most 256 (got '257')"),
        (["--max-rank", "many"], "--max-rank: must be a whole number (got 'many')"),
        (["--max-batch-tokens", "2.5"], "--max-batch-tokens: must be a whole number (got '2.5')"),
        (["--port", "65536"], "--port: must be at most 65,535 (got '65536')"),
        (["--kv-memory-gib", "0"], "--kv-memory-gib: must be more than 0 (got '0')"),
        (["--kv-memory-gib", "nan"], "--kv-memory-gib: must be a finite number (got 'nan')"),
        (["--dtype", "fp16"], "--dtype: must be 'auto', 'bf16' or 'fp32' (got 'fp16')"),
        (["--adapter", "a"], "--adapter: must be NAME=FOLDER or NAME=ADDRESS, without commas (got 'a')"),
        (["--adapter", "a=/x", "--adapter", "a=/y"], "--adapter: the name 'a' is given twice"),
        (["--adapter-root", "/no/such"], "--adapter-root: must be an existing folder (got '/no/such')"),
        (["--device-ranks", "8"], "--device-ranks: must be at least --max-rank, 256 (got 8)"),
        (["--nix", "1"], "--nix: there is no such option; see --help"),
        (["--max-r", "8"], "--max-r: there is no such option; did you mean --max-rank?"),
        (["--adapter-root", ""], "--adapter-root: must not be empty"),
        (["--data-dir", ""], "--data-dir: must not be empty"),
        (["--kv-memory-gib", "1e9"], "--kv-memory-gib: must be at most 1,048,576 (got '1e9')"),
        (["--max-device-adapters", "65537"], "--max-device-adapters: must be at most 65,536 (got '65537')"),
        (["--port"], "--port: needs a value"),
        (["stray"], "there is no option or command 'stray'; options begin with --"),
        ([""], "there is no option or command ''; options begin with --"),
        (["a (b", "c"], "there is no option or command 'a (b c'; options begin with --"),
    ],
)
def test_invalid_value_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_settings(words)
    assert str(raised.value) == message


def test_each_invalid_value_is_its_own_line() -> None:
    with pytest.raises(ConfigError) as raised:
        Settings(max_rank=0, port=-1, nix=3)
    assert str(raised.value).splitlines() == [
        "--port: must be at least 0 (got -1)",
        "--max-rank: must be at least 1 (got 0)",
        "--nix: there is no such option",
    ]


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        ({}, 256),
        ({"max_device_adapters": 32}, 512),
        ({"max_device_adapters": 1, "max_rank": 3}, 16),
        ({"max_device_adapters": 1, "max_rank": 17}, 24),
        ({"device_ranks": 257}, 264),
    ],
)
def test_rank_columns(given: dict[str, int], columns: int) -> None:
    assert Settings(**given).rank_columns == columns
