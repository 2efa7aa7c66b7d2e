"""The options of ``manylora bench``, and the workloads that they describe."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, Self

from aiohttp import encode_basic_auth
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsConfigDict
from yarl import URL

from bases import pydantic_errors
from bases.command_line import Given, Options, parse
from loadtests import error_text
from loadtests.drive.peers import EndpointName, PeerName
from loadtests.drive.registration import AdapterSetup
from loadtests.errors import BadOption
from loadtests.limits import (
    MAX_ADAPTERS,
    MAX_RANK,
    MAX_REPEATS,
    MAX_REQUESTS,
    MAX_SEED,
    MAX_TOKENS,
    MAX_WORDS,
    check_range,
)
from loadtests.report.thresholds import Threshold, check_applied, parse_threshold
from loadtests.workload import arrivals, mixes
from loadtests.workload.adapters import RANK, AdapterGenerator, ModelShape, Targets
from loadtests.workload.arrivals import parse_arrivals
from loadtests.workload.lengths import parse_lengths
from loadtests.workload.mixes import parse_mix
from loadtests.workload.trace import read_trace
from loadtests.workload.workload import Prefix, Workload

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_TIMEOUT = 86_400.0
SHOWN = 200
"""Longest wrong value that a message shows, in characters."""
SECRET = {"--url", "--api-key"}
"""Options whose value no message shows. An address may contain a password."""
GENERATOR_OPTIONS = ("ranks", "targets", "adapter_seed", "config", "adapter_folder")


class _Options(Options):
    """Options whose messages show no secrets, and only the start of a long value."""

    model_config = SettingsConfigDict(validate_default=True)
    error = BadOption

    @classmethod
    def error_line(cls, detail: ErrorDetails, places: Mapping[str, str]) -> str:
        """Return one of pydantic's errors, as ``--count: must be at least 1 (got '0')``."""
        message = pydantic_errors.message(detail)
        if not detail["loc"]:
            return message
        where, value = cls.flag(str(detail["loc"][0])), detail["input"]
        if where == "FILES":
            return f"FILES: give two or more, as `manylora bench --json FILE` writes them (got {len(value)})"
        return f"{where}: {message}" if where in SECRET else f"{where}: {message} (got {repr(value)[:SHOWN]})"


class BenchSettings(_Options):
    """Measure a server over HTTP: every mix of adapters with every kind of arrivals."""

    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "Server": ("url", "spawn", "api_key", "peer", "base", "endpoint"),
        "Adapters": (
            "adapters", "count", "ranks", "targets", "adapter_seed", "config", "adapter_folder", "registered",
        ),
        "Requests": (
            "arrivals", "prompt_tokens", "output_tokens", "shared_prefix", "trace", "requests", "requests_per_client",
            "warm_up", "repeats", "seed", "timeout",
        ),
        "Results": ("json_file", "html", "table", "fail_if"),
    }  # fmt: skip
    metavars: ClassVar[Mapping[str, str]] = {
        "spawn": "COMMAND",
        "api_key": "KEY",
        "base": "NAME",
        "adapters": "MIX,...",
        "ranks": "RANK,...",
        "config": "FILE",
        "adapter_folder": "FOLDER",
        "arrivals": "ARRIVALS,...",
        "prompt_tokens": "LENGTH",
        "output_tokens": "LENGTH",
        "shared_prefix": "PREFIX",
        "trace": "FILE",
        "json_file": "FILE",
        "html": "FILE",
        "fail_if": "CONDITION",
    }

    url: str = Field(
        default_factory=lambda: os.environ.get("MANYLORA_URL", DEFAULT_URL),
        description=f"running server, without /v1 (unset: MANYLORA_URL, or {DEFAULT_URL})",
    )
    spawn: str | None = Field(
        None, min_length=1, description="start a server for the run, e.g. 'manylora serve --threads 2'"
    )
    api_key: SecretStr | None = Field(
        default_factory=lambda: SecretStr(key) if (key := os.environ.get("MANYLORA_API_KEY")) else None,
        description="API key of the server, or of a proxy in front of it (unset: MANYLORA_API_KEY)",
    )
    peer: PeerName = Field("manylora", description="kind of server")
    base: str | None = Field(None, min_length=1, description="name of the base (unset: from /v1/models)")
    endpoint: EndpointName = Field("completions", description="endpoint to call, always streaming")

    adapters: tuple[str, ...] = Field(
        ("base", "single", "distinct", "zipf:1@64"),
        min_length=1,
        description="which adapter requests name; see above",
    )
    count: int = Field(16, ge=1, le=MAX_ADAPTERS, description="number of adapters in mixes without @COUNT")
    ranks: tuple[int, ...] = Field((RANK,), min_length=1, description="ranks of the generated adapters, in turn")
    targets: Targets = Field("all-linear", description="layers of the generated adapters")
    adapter_seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the generated adapters")
    config: Path | None = Field(None, description="config.json of the base (unset: the demo model's shape)")
    adapter_folder: Path | None = Field(
        None, description="write adapters here and register them by path, as vLLM needs it (unset: upload)"
    )
    registered: bool = Field(False, description="use the server's own bench-000, bench-001, ... and keep them")

    arrivals: tuple[str, ...] = Field(
        ("closed:1", "closed:16"), min_length=1, description="when requests are sent; see above"
    )
    prompt_tokens: str = Field("128", description="prompt length: TOKENS or lognormal:MEDIAN:SIGMA:LEAST:MOST")
    output_tokens: str = Field("64", description="answer length, in the same form")
    shared_prefix: str | None = Field(
        None, description="prefix that prompts share: global:TOKENS[:SHARE] or adapter:TOKENS[:SHARE]"
    )
    trace: Path | None = Field(None, description="JSONL with prompt_tokens, output_tokens, arrival, adapter")
    requests: int | None = Field(
        None,
        ge=1,
        le=MAX_REQUESTS,
        description="requests per round (unset: all of the trace; else 2 per client, at least 8, or 20 s)",
    )
    requests_per_client: int = Field(
        2, ge=1, le=MAX_REQUESTS, description="requests per client and round of a closed loop without --requests"
    )
    warm_up: int | None = Field(
        None,
        ge=0,
        le=MAX_REQUESTS,
        description="short requests before the first round (unset: one per client and adapter, for 64 at most)",
    )
    repeats: int = Field(3, ge=1, le=MAX_REPEATS, description="rounds; the figures are their medians")
    seed: int = Field(
        0,
        ge=0,
        le=MAX_SEED,
        description="seed of the workload; change it between runs, as servers cache prompts",
    )
    timeout: float = Field(300.0, gt=0, le=MAX_TIMEOUT, description="a request fails after this time without a byte")

    json_file: Path | None = Field(None, alias="json", description="write all results here")
    html: Path | None = Field(None, description="write a report with plots here")
    table: Literal["plain", "markdown"] = Field("plain", description="format of the printed table")
    fail_if: tuple[str, ...] = Field(
        (),
        description="exit with status 1 if it holds, e.g. 'ttft_p95_ms>500' or 'zipf/fairness<0.9'; repeatable",
    )

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key and not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
            raise ValueError("has characters that are not allowed in an HTTP header")
        return key

    @field_validator("url")
    @classmethod
    def _check_url(cls, text: str) -> str:
        try:
            url = URL(text)
            host, _ = url.host or "", url.port
            host.encode("idna")
        except ValueError as error:
            raise ValueError(f"is not a URL: {error}") from None
        if url.scheme not in ("http", "https") or not host or not host.isprintable() or " " in host:
            raise ValueError("must be http://HOST or https://HOST, optionally with :PORT and /PATH")
        if url.query_string or url.fragment:
            raise ValueError("must not have a query or a fragment (? or #)")
        return text

    @model_validator(mode="after")
    def _refuse_unused_options(self) -> Self:
        """Refuse an option that would have no effect, by its name."""
        given_at_start = self.peer == "llamacpp" or (self.peer == "vllm" and self.adapter_folder is None)
        reasons: list[tuple[object, str, tuple[str, ...]]] = [
            (self.spawn, "--spawn", ("url", "adapter_folder")),
            (self.registered, "--registered", GENERATOR_OPTIONS),
            (given_at_start, f"--peer {self.peer}, which loads its adapters at its start", GENERATOR_OPTIONS),
            (self.trace, "--trace", ("prompt_tokens", "output_tokens", "requests_per_client")),
            (self.requests, "--requests", ("requests_per_client",)),
        ]
        for given, reason, ignored in reasons:
            if given and (names := [name for name in ignored if name in self.model_fields_set]):
                raise ValueError(f"--{names[0].replace('_', '-')} has no effect with {reason}")
        if self.spawn and self.peer != "manylora":
            raise ValueError("--spawn starts a manylora server; start other servers yourself and give their --url")
        if self.api_key and URL(self.url).user is not None and not self.spawn:
            raise ValueError("--url has a user name, so --api-key cannot be sent too")
        return self

    @property
    def address(self) -> URL:
        """The server's URL without user name and password, with a slash at the end."""
        url = URL(self.url).with_user(None)
        return url if url.path.endswith("/") else url / ""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        if self.api_key:
            return {"Authorization": f"Bearer {self.api_key.get_secret_value()}"}
        url = URL(self.url)
        return {"Authorization": encode_basic_auth(url.user or "", url.password or "")} if url.user is not None else {}

    def workloads(self) -> list[Workload]:
        """Return all workloads, mix by mix. Reads the trace. Raises BadOption for options that do not go together."""
        trace = None if self.trace is None else read_trace(self.trace)
        with _naming_option("--prompt-tokens"):
            prompt = parse_lengths(self.prompt_tokens)
        with _naming_option("--output-tokens"):
            output = parse_lengths(self.output_tokens)
        with _naming_option("--adapters"):
            every_mix = [parse_mix(text, self.count) for text in self.adapters]
        with _naming_option("--arrivals"):
            every_arrivals = [parse_arrivals(text) for text in self.arrivals]
        prefix = None if self.shared_prefix is None else parse_prefix(self.shared_prefix)
        workloads = [
            Workload(mix, arrival, prompt, output, prefix, trace, self.requests, self.requests_per_client)
            for mix in every_mix
            for arrival in every_arrivals
        ]
        for work in workloads:
            _check(work)
        names = [work.name for work in workloads]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BadOption(f"--adapters, --arrivals: workload {twice[0]!r} is given twice")
        return workloads

    def thresholds(self, workloads: Sequence[Workload]) -> list[Threshold]:
        """Return the conditions of ``--fail-if``. Raises BadOption."""
        with _naming_option("--fail-if"):
            thresholds = [parse_threshold(text) for text in self.fail_if]
            check_applied(thresholds, workloads)
        return thresholds

    def adapter_setup(self, folder: Path | None) -> AdapterSetup:
        """Return how adapters are generated and get to the server. Raises BadOption."""
        for rank in self.ranks:
            check_range("--ranks: a rank", rank, 1, MAX_RANK)
        return AdapterSetup(
            AdapterGenerator(self.model_shape(), self.adapter_seed, self.ranks, self.targets), folder, self.registered
        )

    def model_shape(self) -> ModelShape:
        """Return the dimensions of the base. Raises BadOption."""
        if self.config is None:
            return ModelShape()
        try:
            return ModelShape.read(self.config)
        except OSError as error:
            raise BadOption(f"--config: {self.config}: {error_text.file_error(error)}") from None
        except ValueError as error:
            raise BadOption(f"--config: {self.config}: {error}; give the config.json of the base's folder") from None


class CompareSettings(_Options):
    """Compare results of manylora bench. Ratios are to the first.

    Example: manylora bench compare before.json after.json --html compare.html
    """

    positional = "files"
    metavars: ClassVar[Mapping[str, str]] = {"files": "FILE", "html": "FILE"}

    files: tuple[Path, ...] = Field(min_length=2, description="files that --json wrote")
    html: Path | None = Field(None, description="write a report with plots here")
    table: Literal["plain", "markdown"] = Field("plain", description="format of the printed table")
    force: bool = Field(False, description="compare even if the workloads differ")


def read_bench(words: Sequence[str]) -> BenchSettings:
    """Parse the words after ``manylora bench``. Raises BadOption."""
    return make_bench(parse(BenchSettings, words, "manylora bench"))


def make_bench(given: Given) -> BenchSettings:
    """Return the settings for the fields that the command line gives. Raises BadOption."""
    return BenchSettings(**{BenchSettings.model_fields[name].alias or name: value for name, value in given.items()})


def parse_prefix(text: str) -> Prefix:
    """Parse ``"adapter:64"`` or ``"global:64:0.5"``. Raises BadOption."""
    try:
        match text.split(":"):
            case [("global" | "adapter") as scope, tokens, *rest] if len(rest) < 2:
                prefix = Prefix(scope, int(tokens), float(rest[0]) if rest else 1.0)
                if 1 <= prefix.tokens <= MAX_TOKENS and 0 < prefix.share <= 1:
                    return prefix
    except ValueError:
        pass
    raise BadOption(
        f"--shared-prefix: {text!r} is not global:TOKENS[:SHARE] or adapter:TOKENS[:SHARE], TOKENS from 1 to "
        f"{MAX_TOKENS:,}, SHARE above 0 up to 1"
    )


def _check(work: Workload) -> None:
    trace = work.trace
    traced_mix, traced_times = isinstance(work.mix, mixes.TraceMix), isinstance(work.arrivals, arrivals.TraceArrivals)
    if (traced_mix or traced_times) and trace is None:
        raise BadOption(f"{work.name!r} needs --trace")
    _check_size(work)
    if trace is None:
        return
    if traced_times and not trace.timed:
        raise BadOption("--arrivals trace: the trace has no `arrival`")
    if work.total > len(trace.requests):
        raise BadOption(f"--requests: the trace has {len(trace.requests)} requests (got {work.total})")


def _check_size(work: Workload) -> None:
    check_range(f"--arrivals: {work.name!r}: requests of a round (see --requests)", work.total, 1, MAX_REQUESTS)
    tokens = (
        sum(request.prompt_tokens for request in work.trace.requests)
        if work.trace
        else round(work.total * work.prompt.median)
    )
    check_range(f"--prompt-tokens: {work.name!r}: tokens of all prompts of a round", tokens, 1, MAX_WORDS)


@contextmanager
def _naming_option(option: str) -> Iterator[None]:
    """Put the option in front of the messages of errors."""
    try:
        yield
    except BadOption as error:
        raise BadOption(f"{option}: {error}") from None
