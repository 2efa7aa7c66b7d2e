"""Settings: the options of ``manylora serve`` and ``manylora doctor``, from command line and environment."""

import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from adapters.sources.address import is_address
from bases import machine
from bases.command_line import Given, Options, parse
from bases.options import BaseOptions, default_data_dir
from server.environment import Environment, check_names

_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@*\s]+")
_DEFAULT_PORT = re.compile(r"(?<=^http)(://.*):80$|(?<=^https)(://.*):443$")
"""Browsers leave out the default port of an origin."""
ANY_ADDRESS = "*"
RANK_STEP = 8
"""The device pool's rank columns are a multiple of this."""


def _split_pairs(value: object) -> object:
    """``"a=/x,b=/y"`` -> ``{"a": "/x", "b": "/y"}``; mappings pass through. Repeated flags are joined by commas."""
    if not isinstance(value, str):
        return value
    pairs: dict[str, str] = {}
    for item in value.split(","):
        name, _, path = item.partition("=")
        if not (name and path):
            raise ValueError(f"must be NAME=FOLDER or NAME=ADDRESS, without commas (got {item!r})")
        if name in pairs:
            raise ValueError(f"the name {name!r} is given twice")
        pairs[name] = path
    return pairs


def _split_words(value: object) -> object:
    """``"a,b"`` -> ``("a", "b")``; sequences pass through. Repeated flags are joined by commas."""
    return tuple(word for word in value.split(",") if word) if isinstance(value, str) else value


def _gib_or_auto(value: object) -> object:
    """``auto`` -> None."""
    return None if value == "auto" else value


def _expanded(path: Path) -> Path:
    """Expand ``~`` in ``path``."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} names a home folder that is not known") from error


class Settings(Options):
    """Serve a base model and its adapters over HTTP.

    Options can also be set in the environment: --max-rank 64 is MANYLORA_MAX_RANK=64.

    Example: manylora serve --adapter legal=/srv/adapters/legal --port 8001
    """

    model_config = SettingsConfigDict(env_prefix="MANYLORA_")
    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "Model": (
            "model",
            "quantization",
            "dtype",
            "device",
            "cpu",
            "threads",
            "max_model_len",
            "generation_config",
            "pooling",
            "data_dir",
        ),
        "Chat": ("chat_template", "tool_parser"),
        "Adapters": ("adapter", "adapter_root", "adapter_dir", "allow_source", "fetch_on_request", "max_rank", "runs"),
        "Registry": ("store_url", "database_url", "store_quota_gib", "store_cache_gib"),
        "Memory": ("max_device_adapters", "device_ranks", "host_cache_gib", "kv_memory_gib", "block_size"),
        "Scheduling": (
            *("max_batch_sequences", "max_batch_tokens", "max_queue", "max_queue_tokens", "max_wait_seconds"),
            *("share_prefixes", "speculation", "step_timeout"),
        ),
        "Access": ("api_key_file", "allow_anonymous", "allowed_host", "history_days"),
        "HTTP": (
            *("host", "port", "cors_origin", "forwarded_allow_ips", "lenient", "max_body_mib", "keep_alive_seconds"),
            *("request_timeout_seconds", "write_timeout_seconds", "drain_seconds", "drain_delay_seconds"),
            *("max_connections", "max_connections_per_address", "tls_cert", "tls_key", "no_page"),
        ),
        "Observing": ("log_level", "log_format", "log_prompts", "metrics_adapters"),
    }
    metavars: ClassVar[Mapping[str, str]] = {
        "model": "MODEL",
        "host": "ADDRESS",
        "port": "PORT",
        "data_dir": "FOLDER",
        "adapter": "NAME=PLACE",
        "adapter_root": "FOLDER",
        "adapter_dir": "FOLDER",
        "runs": "FOLDER",
        "allow_source": "PREFIX",
        "kv_memory_gib": "GIB|auto",
        "max_model_len": "TOKENS",
        "chat_template": "FILE",
        "block_size": "TOKENS",
        "max_batch_tokens": "TOKENS",
        "max_queue_tokens": "TOKENS",
        "step_timeout": "SECONDS",
        "cors_origin": "ORIGIN",
        "api_key_file": "FILE",
        "allowed_host": "NAME",
        "forwarded_allow_ips": "ADDRESS",
        "history_days": "DAYS",
        "tls_cert": "FILE",
        "tls_key": "FILE",
    }
    old_flags: ClassVar[Mapping[str, str]] = {"data_dir": "--data"}

    model: str = Field("demo", min_length=1, description="demo, a Hugging Face folder, a GGUF file, or a hub id")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes any free one")
    data_dir: Path = Field(
        default_factory=default_data_dir, description="folder for bases and adapters (unset: manylora in XDG_DATA_HOME)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    cpu: Literal["auto", "amx", "avx512bf16", "avx512", "avx2", "portable", "torch"] = Field(
        "auto", description="which CPU kernels to use; torch uses none and is many times slower"
    )
    quantization: Literal["nf4", "none"] = Field("nf4", description="of the base's linear layers")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="of activations, keys and values; auto is bf16")
    chat_template: Path | None = Field(
        None, description="Jinja file to use instead of the base's own chat template; an adapter's own comes before it"
    )
    tool_parser: Literal["auto", "hermes", "llama", "mistral", "mistral-named", "phi", "qwen-xml"] = Field(
        "auto", description="how the model writes tool calls; auto finds it in the chat template"
    )
    adapter: Annotated[dict[str, Path | str], NoDecode, BeforeValidator(_split_pairs)] = Field(
        default={},
        description="adapter to register at start, from a folder or an hf://, s3:// or gs:// address, which is fetched "
        "once; may be repeated",
    )
    adapter_root: Path | None = Field(None, description="folder under which POST /v1/adapters may name paths")
    adapter_dir: Path | None = Field(None, description="watched folder: each folder in it is an adapter of that name")
    allow_source: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)] = Field(
        default=(), description="hf://, s3:// or gs:// prefix from which adapters may be registered; may be repeated"
    )
    fetch_on_request: bool = Field(
        False, description="register adapters that requests name by an address under --allow-source"
    )
    store_url: str | None = Field(
        None,
        min_length=1,
        description="fsspec address of a shared store of adapters, e.g. s3://bucket/adapters (unset: under --data-dir)",
    )
    database_url: SecretStr | None = Field(
        None, description="PostgreSQL database that several servers share (unset: SQLite under --data-dir)"
    )
    store_quota_gib: float | None = Field(None, gt=0, le=2**20, description="disk space for adapters (unset: no limit)")
    store_cache_gib: float = Field(
        20.0, gt=0, le=2**20, description="disk space under --data-dir for copies of what --store-url keeps"
    )
    runs: Path | None = Field(
        None, description="folder of training runs to show (unset: trained under --data-dir, where train writes)"
    )
    max_device_adapters: int = Field(16, ge=1, le=65536, description="adapters on the device at once")
    host_cache_gib: float = Field(
        1.0, ge=0, le=2**20, description="host memory for adapters that are not on the device"
    )
    max_rank: int = Field(256, ge=1, le=256, description="largest adapter rank accepted")
    device_ranks: int | None = Field(
        None, ge=1, description="rank columns on the device in total (unset: 16 for each of --max-device-adapters)"
    )
    kv_memory_gib: Annotated[float | None, BeforeValidator(_gib_or_auto)] = Field(
        None, gt=0, le=2**20, description="memory for keys and values (unset: auto, chosen by model and machine)"
    )
    block_size: int = Field(
        16, ge=1, le=1024, description="tokens in a block of keys and values; CPU kernels need a multiple of 16"
    )
    max_batch_sequences: int = Field(32, ge=1, description="sequences that run at once")
    max_batch_tokens: int = Field(256, ge=1, description="tokens in one step")
    max_model_len: int | None = Field(None, ge=1, description="longest prompt and answer (unset: the model's limit)")
    pooling: Literal["last", "mean"] | None = Field(
        None,
        description="of hidden states to embeddings (unset: as sentence-transformers' files beside the model say, else "
        "last)",
    )
    max_queue: int = Field(512, ge=1, description="most requests that may wait; further ones get 429")
    max_queue_tokens: int = Field(
        1_000_000, ge=1, description="most tokens of the prompts that wait; further requests get 429"
    )
    max_wait_seconds: float = Field(
        2.0, ge=0, description="after waiting this long for an adapter slot, a request gets the next one"
    )
    share_prefixes: bool = Field(
        False, description="let API keys share cached prefixes: faster, but timing shows one what others have sent"
    )
    generation_config: Literal["auto", "off"] = Field(
        "auto", description="use the sampling defaults of the model's generation_config.json, as vLLM does"
    )
    speculation: Literal["auto", "off"] = Field(
        "auto", description="draft tokens from the prompt and verify them, where that is faster; on CPU kernels only"
    )
    step_timeout: float = Field(
        120,
        gt=0,
        description="seconds after which a step that does not end ends the server, with status 70 and its stacks on "
        "stderr",
    )
    drain_seconds: float = Field(
        30, ge=0, description="time that open requests and registrations get to finish after SIGTERM"
    )
    drain_delay_seconds: float = Field(
        0,
        ge=0,
        le=86_400,
        description="time after SIGTERM in which the server still takes requests while /readyz says that it drains, so "
        "that a load balancer in front notices first",
    )
    keep_alive_seconds: int = Field(
        75,
        ge=1,
        le=86_400,
        description="how long an idle connection stays open; set it above that of a proxy in front",
    )
    api_key_file: Path | None = Field(
        None, description="file with API keys, one a line or YAML; more are made by: manylora keys add"
    )
    allow_anonymous: bool = Field(
        False, description="listen on an address that other machines reach although there are no API keys"
    )
    allowed_host: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)] = Field(
        default=(),
        description="name by which a server without API keys may be called, besides localhost, or *; may be repeated",
    )
    request_timeout_seconds: float = Field(
        30,
        gt=0,
        le=86_400,
        description="time that a client has to send a request's headers, and as much for its body, plus a second for "
        "each 16 KiB",
    )
    write_timeout_seconds: float = Field(
        60, gt=0, le=86_400, description="an answer ends when its client has read nothing for so long"
    )
    max_connections: int | None = Field(
        None, ge=1, description="open connections; further ones get 503 (unset: 4096, or fewer if `ulimit -n` is low)"
    )
    max_connections_per_address: int | None = Field(
        None,
        ge=1,
        description="open connections from one address (unset: half of all, and no limit for this machine's own)",
    )
    history_days: int | None = Field(
        None,
        ge=1,
        le=36_525,
        description="days for which the audit log, usage by day and revoked keys are kept (unset: for ever)",
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of a certificate and its chain: serve HTTPS. Read again when it changes"
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key")
    cors_origin: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)] = Field(
        default=(), description="origin whose pages may call this server, or *; may be repeated"
    )
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)] = Field(
        default=(),
        description="address or network of a proxy whose X-Forwarded-For says where requests come from, or *; may be "
        "repeated (unset: none, each request comes from its connection's address)",
    )
    lenient: bool = Field(
        False, description="ignore unknown fields of requests, and name them in the header x-manylora-ignored"
    )
    no_page: bool = Field(False, description="do not serve the web page at /")
    max_body_mib: float = Field(2, gt=0, description="largest request body")
    threads: int | None = Field(None, ge=1, description="CPU threads for the model (unset: the cores it may use)")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe messages that are logged"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="of log lines: JSON, or text for people; auto is text on a terminal"
    )
    log_prompts: bool = Field(False, description="log what the model reads and writes: prompts and answers in full")
    metrics_adapters: int = Field(
        200, ge=0, le=10_000, description="adapters with metrics of their own; the others are counted together"
    )

    @classmethod
    def other_sources(cls) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment."""
        return (Environment(cls),)

    @field_validator("device_ranks")
    @classmethod
    def _at_least_max_rank(cls, ranks: int | None, info: ValidationInfo) -> int | None:
        max_rank = info.data.get("max_rank")
        if ranks is not None and max_rank is not None and ranks < max_rank:
            raise ValueError(f"must be at least --max-rank, {max_rank} (got {ranks})")
        return ranks

    @field_validator("fetch_on_request")
    @classmethod
    def _has_sources(cls, fetch: bool, info: ValidationInfo) -> bool:
        if fetch and info.data.get("allow_source") == ():
            raise ValueError("needs --allow-source, which says where adapters may come from")
        return fetch

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, url: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        # The message omits the URL, which may contain a password.
        if url is not None and not url.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must begin with postgresql://")
        if url is not None and info.data.get("store_url") is None:
            raise ValueError("needs --store-url: servers that share a registry must share the adapters' files, too")
        return url

    @field_validator("cors_origin")
    @classmethod
    def _normalised_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        # As browsers write them, in lower case and without a slash: they are compared exactly.
        origins = tuple(_DEFAULT_PORT.sub(r"\1\2", origin.lower().rstrip("/")) for origin in origins)
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"must be * or an origin such as https://chat.example.com:8443 (got {origin!r})")
        return origins

    @field_validator("allowed_host")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name.lower().rstrip(".") for name in names)
        for name in names:
            if name != "*" and not _NAME.fullmatch(name):
                raise ValueError(f"must be * or a name such as models.example.com, without a port (got {name!r})")
        return names

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _are_addresses(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            try:
                if word != ANY_ADDRESS:
                    ip_network(word)
            except ValueError:
                raise ValueError(f"must be * or an address or network such as 10.0.0.0/8 (got {word!r})") from None
        return words

    @field_validator(
        *("data_dir", "adapter_root", "adapter_dir", "runs", "chat_template", "api_key_file", "tls_cert", "tls_key"),
        mode="before",
    )
    @classmethod
    def _not_empty(cls, path: object) -> object:
        # Path("") is the working directory: an unset variable in a script would use that.
        if path == "":
            raise ValueError("must not be empty")
        return path

    @field_validator(
        *("data_dir", "adapter_root", "adapter_dir", "runs", "chat_template", "api_key_file", "tls_cert", "tls_key")
    )
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path and _expanded(path).absolute()

    @field_validator("adapter")
    @classmethod
    def _adapters_expanded(cls, adapters: dict[str, Path | str]) -> dict[str, Path | str]:
        places = {name: str(place) for name, place in adapters.items()}
        return {name: place if is_address(place) else _expanded(Path(place)) for name, place in places.items()}

    @field_validator("adapter_root", "adapter_dir")
    @classmethod
    def _must_exist(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError(f"must be an existing folder (got {str(path)!r})")
        return path

    @property
    def base(self) -> BaseOptions:
        """The options of the base to serve."""
        return BaseOptions(self.model, self.data_dir, self.device, self.quantization, self.dtype, self.max_model_len)

    @property
    def runs_folder(self) -> Path:
        """The folder of training runs."""
        return self.runs or self.data_dir / "trained"

    @property
    def cpu_threads(self) -> int:
        """Threads for the model: ``threads``, or the number of physical cores that this process may use."""
        return self.threads or machine.usable_cores()

    @property
    def rank_columns(self) -> int:
        """Rank columns of the device pool, a multiple of :data:`RANK_STEP`."""
        ranks = self.device_ranks or max(self.max_rank, 16 * self.max_device_adapters)
        return -(-ranks // RANK_STEP) * RANK_STEP


def read_settings(words: Sequence[str]) -> Settings:
    """Read settings from the arguments of ``manylora serve``, then the environment.

    Prints the help and raises SystemExit for ``--help``. Raises ConfigError, one line per error.
    """
    return make_settings(parse(Settings, words, "manylora serve"), Settings)


S = TypeVar("S", bound=Settings)


def make_settings(given: Given, options: type[S]) -> S:
    """Make settings from command-line values, then the environment. Raises ConfigError, one line per error."""
    settings = options(**given)
    check_names(options)
    return settings
