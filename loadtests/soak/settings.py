"""The options of ``python -m loadtests.soak``."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from bases.command_line import Options
from bases.errors import ManyloraError
from loadtests.errors import BadOption
from loadtests.limits import MAX_SEED

Kind = Literal[
    "whole", "stream", "chat", "structured", "vector", "leave", "slow", "half", "register", "roll-back", "delete",
    "pin", "set-alias", "remove-alias", "read", "bad", "key",
]  # fmt: skip
"""What a client does."""


class SoakSettings(Options):
    """Load a server with clients of every kind for a long time, and watch that nothing leaks and no answer changes.

    Starts a server of the demo model unless --url or --spawn is given. Exit status: 0; 1 if something was violated.

    Example: python -m loadtests.soak --minutes 30 --json soak.json --plot soak.svg
    """

    model_config = SettingsConfigDict(populate_by_name=True)
    error: ClassVar[type[ManyloraError]] = BadOption
    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "Server": ("url", "spawn", "api_key", "pid", "config"),
        "Load": ("minutes", "warm_up", "clients", "only", "contents", "ranks", "answer_tokens", "seed"),
        "Watched": ("sample_seconds", "memory_growth_mib", "spare_files", "spare_threads", "idle_seconds"),
        "Results": ("json_file", "plot"),
    }
    metavars: ClassVar[Mapping[str, str]] = {
        "spawn": "COMMAND", "api_key": "KEY", "config": "FILE", "ranks": "RANK,...", "json_file": "FILE",
        "plot": "FILE", "minutes": "MINUTES", "only": "KIND,...", "warm_up": "SHARE",
    }  # fmt: skip

    url: str | None = Field(None, pattern=r"^https?://[^/?#]+/?$", description="running server (unset: start one)")
    spawn: str | None = Field(None, min_length=1, description="command of the server to start (unset: the demo model)")
    api_key: SecretStr | None = Field(
        default_factory=lambda: SecretStr(key) if (key := os.environ.get("MANYLORA_API_KEY")) else None,
        description="an admin's key, where the server has keys (unset: MANYLORA_API_KEY)",
    )
    pid: int | None = Field(None, ge=1, description="process of the server at --url, to watch it in /proc")
    config: Path | None = Field(None, description="config.json of the base (unset: the demo model's shape)")

    minutes: float = Field(30, gt=0, le=14 * 24 * 60, description="how long clients send requests")
    warm_up: float = Field(0.2, ge=0, le=0.9, description="share of the time before memory has to be flat")
    clients: int = Field(8, ge=1, le=1000, description="clients, each with one request at a time")
    only: tuple[Kind, ...] = Field((), description="only these kinds of clients (unset: all)")
    contents: int = Field(12, ge=2, le=1000, description="different adapter contents")
    ranks: tuple[int, ...] = Field((4, 8, 16), min_length=1, description="ranks of the contents, in turn")
    answer_tokens: int = Field(24, ge=1, le=4096, description="tokens of the answers that are compared")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the clients")

    sample_seconds: float = Field(5, gt=0, le=3600, description="time between two samples of what is watched")
    memory_growth_mib: float = Field(64, description="most growth of resident memory after the warm-up")
    spare_files: int = Field(16, ge=0, description="open files at the end beyond those at the start")
    spare_threads: int = Field(48, ge=0, description="threads at the end beyond those at the start")
    idle_seconds: float = Field(60, gt=0, description="time that the server gets to be idle at the end")

    json_file: Path | None = Field(None, alias="json", description="write all results here")
    plot: Path | None = Field(None, description="draw memory over time here, as SVG or PNG")

    @model_validator(mode="after")
    def _one_server(self) -> "SoakSettings":
        if self.url and self.spawn:
            raise ValueError("--url, --spawn: give one of them")
        if self.pid and not self.url:
            raise ValueError("--pid: the process is known of a server that is started; leave it out, or give --url")
        return self
