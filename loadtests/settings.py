"""The options of ``manylora bench``: one frozen object, and the workloads they amount to."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from loadtests import arrivals, mixes
from loadtests.adapters import RANK, Geometry, Recipe, Targets
from loadtests.arrivals import parse_arrivals
from loadtests.errors import BadOption
from loadtests.lengths import parse_lengths
from loadtests.mixes import parse_mix
from loadtests.peers import EndpointName, PeerName
from loadtests.registration import Supply
from loadtests.thresholds import Threshold, check_names, parse_threshold
from loadtests.trace import read_trace
from loadtests.workload import Prefix, Workload

HERE = "http://127.0.0.1:8000"


class _Options(BaseSettings):
    """Options from the command line alone: a variable called URL or SEED was not meant for us."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        cli_kebab_case=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags="toggle",
    )

    def __init__(self, **values: Any) -> None:
        """From keyword arguments alone. Raises BadOption, one line per error."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise BadOption("\n".join(_line(dict(detail)) for detail in error.errors())) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class BenchSettings(_Options):
    """Measures a server over HTTP: every mix of adapters under every kind of arrivals.

    `manylora bench compare A.json B.json` lays runs side by side.
    """

    url: str = Field(
        default_factory=lambda: os.environ.get("MANYLORA_URL", HERE),
        pattern="^https?://",
        description="a running server (unset: MANYLORA_URL, or where manylora serve listens)",
    )
    spawn: str | None = Field(
        None, min_length=1, description="start a manylora for the run, e.g. 'manylora serve --threads 2'"
    )
    api_key: SecretStr | None = Field(
        default_factory=lambda: SecretStr(key) if (key := os.environ.get("MANYLORA_API_KEY")) else None,
        description="where the server, or a proxy before it, asks for one (unset: MANYLORA_API_KEY)",
    )
    peer: PeerName = Field("manylora", description="what kind of server it is")
    base: str | None = Field(None, min_length=1, description="the base's name (unset: as /v1/models says)")
    endpoint: EndpointName = Field("completions", description="which of the two is asked, always streaming")

    adapters: tuple[str, ...] = Field(
        ("base", "single", "distinct", "zipf:1@64"), min_length=1, description=f"comma-separated: {mixes.FORMS}"
    )
    count: int = Field(16, ge=1, description="adapters of a mix that does not say")
    ranks: tuple[int, ...] = Field((RANK,), min_length=1, description="of the adapters made, given out in turn")
    targets: Targets = Field("all-linear", description="layers of the adapters made")
    adapter_seed: int = Field(0, ge=0, description="of the adapters made")
    config: Path | None = Field(None, description="config.json of the base (unset: the demo model's shape)")
    adapter_folder: Path | None = Field(
        None, description="write the adapters here and register them by path (unset: upload); vLLM has no other way"
    )
    registered: bool = Field(False, description="the server has bench-000, ... already and keeps them")

    arrivals: tuple[str, ...] = Field(
        ("closed:1", "closed:16"), min_length=1, description=f"comma-separated: {arrivals.FORMS}"
    )
    prompt_tokens: str = Field("128", description="about, in common words: TOKENS or lognormal:MEDIAN:SIGMA:LEAST:MOST")
    output_tokens: str = Field("64", description="the same for the answers")
    shared_prefix: str | None = Field(
        None, description="beginning that prompts share, global:TOKENS[:SHARE] or adapter:TOKENS[:SHARE]"
    )
    trace: Path | None = Field(None, description="JSONL of prompt_tokens, output_tokens, and arrival and adapter")
    requests: int | None = Field(
        None, ge=1, description="in a round (unset: the trace; or 8 at least, 2 a client, 20 s of an open loop)"
    )
    requests_per_client: int = Field(2, ge=1, description="in a round of a closed loop without --requests")
    warm_up: int | None = Field(
        None, ge=0, description="short requests before the first round (unset: one a client and adapter, 64 at most)"
    )
    repeats: int = Field(3, ge=1, description="rounds; figures are their medians")
    seed: int = Field(0, ge=0, description="of the work; a server that saw it may have its prompts cached")
    timeout: float = Field(300.0, gt=0, description="seconds without a byte after which a request has failed")

    json_file: Path | None = Field(None, alias="json", description="write everything here")
    html: Path | None = Field(None, description="write a page with plots here")
    table: Literal["plain", "markdown"] = Field("plain", description="how the table is printed")
    fail_if: tuple[str, ...] = Field(
        (), description="e.g. 'ttft_p95_ms>500' or 'zipf/fairness<0.9': exit status 1 where it holds; may be repeated"
    )

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, key: SecretStr | None) -> SecretStr | None:
        if key and not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
            raise ValueError("has characters that no header can carry")
        return key

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Authorization": f"Bearer {self.api_key.get_secret_value()}"} if self.api_key else {}

    def workloads(self) -> list[Workload]:
        """All of them, mix by mix. Reads the trace. Raises BadOption for what does not go together."""
        trace = None if self.trace is None else read_trace(self.trace)
        with _naming("--prompt-tokens"):
            prompt = parse_lengths(self.prompt_tokens)
        with _naming("--output-tokens"):
            output = parse_lengths(self.output_tokens)
        with _naming("--adapters"):
            every_mix = [parse_mix(text, self.count) for text in self.adapters]
        with _naming("--arrivals"):
            every_arrivals = [parse_arrivals(text) for text in self.arrivals]
        prefix = None if self.shared_prefix is None else parse_prefix(self.shared_prefix)
        works = [
            Workload(mix, arrival, prompt, output, prefix, trace, self.requests, self.requests_per_client)
            for mix in every_mix
            for arrival in every_arrivals
        ]
        for work in works:
            _check(work)
        names = [work.name for work in works]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BadOption(f"{twice[0]!r} is asked for twice")
        return works

    def thresholds(self, works: Sequence[Workload]) -> list[Threshold]:
        """What must not hold. Raises BadOption."""
        with _naming("--fail-if"):
            thresholds = [parse_threshold(text) for text in self.fail_if]
            check_names(thresholds, [work.name for work in works])
        return thresholds

    def supply(self, folder: Path | None) -> Supply:
        """How adapters are made and come to the server. Raises BadOption."""
        if any(rank < 1 for rank in self.ranks):
            raise BadOption(f"--ranks: must be at least 1 (got {min(self.ranks)})")
        return Supply(Recipe(self.geometry(), self.adapter_seed, self.ranks, self.targets), folder, self.registered)

    def geometry(self) -> Geometry:
        """Of the base. Raises BadOption."""
        if self.config is None:
            return Geometry()
        try:
            return Geometry.read(self.config)
        except (OSError, ValueError) as error:
            raise BadOption(f"--config: {error}") from None
        except KeyError as error:
            raise BadOption(f"--config: {self.config} has no {error}") from None


class CompareSettings(_Options):
    """Lays runs side by side; ratios are to the first."""

    files: CliPositionalArg[tuple[Path, ...]] = Field(min_length=2, description="what --json wrote")
    html: Path | None = Field(None, description="write a page with plots here")
    table: Literal["plain", "markdown"] = Field("plain", description="how the table is printed")
    force: bool = Field(False, description="also where the work was different")


def read_bench(words: Sequence[str]) -> BenchSettings:
    """From the words after ``manylora bench``; prints the help and exits on ``--help``. Raises BadOption."""
    return BenchSettings(**_flags(BenchSettings, words, "manylora bench"))


def read_compare(words: Sequence[str]) -> CompareSettings:
    """From the words after ``manylora bench compare``; as :func:`read_bench`."""
    return CompareSettings(**_flags(CompareSettings, words, "manylora bench compare"))


def parse_prefix(text: str) -> Prefix:
    """``"adapter:64"``, ``"global:64:0.5"``. Raises BadOption."""
    try:
        match text.split(":"):
            case [("global" | "adapter") as scope, tokens, *rest] if len(rest) < 2:
                prefix = Prefix(scope, int(tokens), float(rest[0]) if rest else 1.0)
                if prefix.tokens >= 1 and 0 < prefix.share <= 1:
                    return prefix
    except ValueError:
        pass
    raise BadOption(
        f"--shared-prefix: {text!r} is not global:TOKENS[:SHARE] or adapter:TOKENS[:SHARE], SHARE above 0 up to 1"
    )


def _check(work: Workload) -> None:
    trace = work.trace
    traced_mix, traced_times = isinstance(work.mix, mixes.Traced), isinstance(work.arrivals, arrivals.Traced)
    if (traced_mix or traced_times) and trace is None:
        raise BadOption(f"{work.name!r} needs --trace")
    if trace is None:
        return
    if traced_times and not trace.timed:
        raise BadOption("--arrivals trace: the trace has no `arrival`")
    if work.total > len(trace.rows):
        raise BadOption(f"--requests: the trace has {len(trace.rows)} rows (got {work.total})")


@contextmanager
def _naming(option: str) -> Iterator[None]:
    try:
        yield
    except BadOption as error:
        raise BadOption(f"{option}: {error}") from None


def _flags(settings: type[_Options], words: Sequence[str], program: str) -> dict[str, Any]:
    try:
        return dict(CliSettingsSource[Any](settings, cli_parse_args=list(words), cli_prog_name=program)())
    except SettingsError as error:
        raise BadOption(str(error).removeprefix("error parsing CLI: ")) from None


def _line(detail: dict[str, Any]) -> str:
    """One error of pydantic, as ``--count: Input should be greater than or equal to 1 (got '0')``."""
    name = str(detail["loc"][0]).replace("_", "-")
    where = "FILES" if name == "files" else f"--{name}"
    return f"{where}: {detail['msg']} (got {detail['input']!r})"
