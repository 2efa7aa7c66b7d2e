"""``python -m loadtests.streams --count 500``: many streams at once; each is complete, or refused with 429.

Exit status: 0; 1 if a stream failed in another way, or all were refused; 2 for a bad option; 130 after Ctrl-C.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import httpx2
import numpy as np
from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from bases import interrupts
from bases.command_line import Options, parse
from bases.errors import ManyloraError
from loadtests import cancellation
from loadtests.drive.demo_server import demo_server
from loadtests.drive.progress import Display
from loadtests.drive.server_process import spawned
from loadtests.drive.streams import StreamBroken, events
from loadtests.error_text import status_error
from loadtests.errors import BadOption
from loadtests.limits import MAX_CLIENTS, MAX_SEED, MAX_TOKENS
from loadtests.machine import client_machine, client_version
from loadtests.report.table import number
from loadtests.workload.workload import words

PROGRAM = "python -m loadtests.streams"
PERCENTS = (50, 90, 95, 99, 100)


class StreamsSettings(Options):
    """Open many streams at once. Each must be complete, or refused with 429.

    Starts a server of the demo model unless --url or --spawn is given.

    Example: python -m loadtests.streams --count 500
    """

    model_config = SettingsConfigDict(populate_by_name=True)
    error: ClassVar[type[ManyloraError]] = BadOption
    metavars: ClassVar[Mapping[str, str]] = {
        "spawn": "COMMAND", "api_key": "KEY", "adapters": "NAME,...", "json_file": "FILE",
    }  # fmt: skip

    count: int = Field(500, ge=1, le=MAX_CLIENTS, description="streams at once, each over a connection of its own")
    url: str | None = Field(None, pattern=r"^https?://[^/?#]+/?$", description="running server (unset: start one)")
    spawn: str | None = Field(None, min_length=1, description="command of the server to start (unset: the demo model)")
    api_key: SecretStr | None = Field(
        default_factory=lambda: SecretStr(key) if (key := os.environ.get("MANYLORA_API_KEY")) else None,
        description="API key of the server (unset: MANYLORA_API_KEY)",
    )
    adapters: tuple[str, ...] = Field((), description="adapters of the server to ask in turn (unset: the base alone)")
    prompt_tokens: int = Field(24, ge=1, le=MAX_TOKENS, description="length of prompts, in words")
    output_tokens: int = Field(32, ge=1, le=MAX_TOKENS, description="length of answers, in tokens")
    ramp_seconds: float = Field(0, ge=0, le=3600, description="time over which the streams are opened")
    timeout: float = Field(600, gt=0, le=86_400, description="a stream fails after this time without a byte")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the prompts")
    json_file: Path | None = Field(None, alias="json", description="write all results here")

    @model_validator(mode="after")
    def _one_server(self) -> "StreamsSettings":
        if self.url and self.spawn:
            raise ValueError("--url, --spawn: give one of them")
        return self


@dataclass(frozen=True, slots=True)
class Stream:
    """How one stream went. Times are seconds from its start."""

    outcome: str
    """``complete``, ``refused`` (429), or what went wrong."""
    first_text: float | None = None
    ended: float = 0.0
    retry_after: str | None = None


async def open_streams(settings: StreamsSettings, url: str) -> list[Stream]:
    """Open all streams and read each to its end."""
    key = settings.api_key
    headers = {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx2.Timeout(settings.timeout)
    async with (
        httpx2.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout, trust_env=False) as http,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(_stream(http, settings, index)) for index in range(settings.count)]
    return [task.result() for task in tasks]


async def _stream(http: httpx2.AsyncClient, settings: StreamsSettings, index: int) -> Stream:
    await asyncio.sleep(settings.ramp_seconds * index / settings.count)
    began, first, tokens = time.perf_counter(), None, None
    try:
        async with http.stream("POST", "/v1/completions", json=_body(settings, index)) as response:
            if response.status_code != httpx2.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                if response.status_code == httpx2.codes.TOO_MANY_REQUESTS:
                    return Stream("refused", None, time.perf_counter() - began, response.headers.get("retry-after"))
                return Stream(status_error(response.status_code, text), None, time.perf_counter() - began)
            async for event in events(response):
                if first is None and any(choice["text"] for choice in event["choices"]):
                    first = time.perf_counter() - began
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (httpx2.TransportError, StreamBroken) as error:
        return Stream(f"{type(error).__name__} {error}".strip(), first, time.perf_counter() - began)
    right = tokens == settings.output_tokens
    outcome = "complete" if right else f"{tokens} tokens instead of {settings.output_tokens}"
    return Stream(outcome, first, time.perf_counter() - began)


def _body(settings: StreamsSettings, index: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": words(random.Random(f"{settings.seed}/{index}"), settings.prompt_tokens),
        "max_tokens": settings.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.adapters:
        body["adapter"] = settings.adapters[index % len(settings.adapters)]
    return body


def record(settings: StreamsSettings, streams: Sequence[Stream], seconds: float) -> dict[str, Any]:
    """Return the results as JSON."""
    complete = [stream for stream in streams if stream.outcome == "complete"]
    return {
        "version": client_version(),
        "machine": client_machine(),
        "settings": settings.model_dump(mode="json", exclude={"url", "api_key", "spawn"}),
        "seconds": seconds,
        "outcomes": dict(Counter(stream.outcome for stream in streams).most_common()),
        "retry_after": sorted({stream.retry_after for stream in streams if stream.retry_after}),
        "output_tokens_per_s": len(complete) * settings.output_tokens / seconds,
        "first_text_seconds": _percentiles([s.first_text for s in complete if s.first_text is not None]),
        "end_to_end_seconds": _percentiles([s.ended for s in complete]),
        "refused_after_seconds": _percentiles([s.ended for s in streams if s.outcome == "refused"]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTS} if values else {}


def summary(found: Mapping[str, Any]) -> str:
    """Return the results as lines."""
    lines = [f"{count:>6,}  {outcome}" for outcome, count in found["outcomes"].items()]
    lines.append(f"{found['seconds']:.1f} s, {number(found['output_tokens_per_s'])} tokens/s")
    for name in ("first_text", "end_to_end", "refused_after"):
        if values := found[f"{name}_seconds"]:
            shown = ", ".join(f"{percent} {number(value)}" for percent, value in values.items())
            lines.append(f"{name.replace('_', ' ')}, s: {shown}")
    return "\n".join(lines)


def failed(found: Mapping[str, Any]) -> bool:
    """Whether a stream was neither complete nor refused, or none was complete."""
    outcomes = found["outcomes"]
    return "complete" not in outcomes or bool(outcomes.keys() - {"complete", "refused"})


def main(words: Sequence[str]) -> int:
    """Open the streams and report how they went. Returns the exit status."""
    try:
        settings = StreamsSettings(**parse(StreamsSettings, words, PROGRAM))
        if (file := settings.json_file) and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise BadOption(f"--json: {file} cannot be written")
        found = _run(settings)
    except ManyloraError as error:
        for line in error.terminal_lines():
            print(f"streams: {line}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return interrupts.STATUS
    if settings.json_file:
        settings.json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(summary(found), flush=True)
    return 1 if failed(found) else 0


def _run(settings: StreamsSettings) -> dict[str, Any]:
    with ExitStack() as stack:
        stack.enter_context(interrupts.sigterm_raises())
        url = settings.url
        if url is None:
            root = Path(stack.enter_context(TemporaryDirectory(prefix="streams-")))
            url = stack.enter_context(spawned(settings.spawn or demo_server(root / "data"), root)).url
        Display(Console(stderr=True)).say(f"opening {settings.count} streams ...")
        began = time.perf_counter()
        streams = cancellation.run_cancellable(open_streams(settings, url))
        return record(settings, streams, time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
