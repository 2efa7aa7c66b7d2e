"""The demo model, served as a user does: in a separate process, with OpenAI's client and signals."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.adapter_folders import DEMO_LAYOUT, write_adapter
from tests.api.live import wait_for

pytestmark = pytest.mark.demo

ROOT = Path(__file__).parents[3]
QUESTION = {"role": "user", "content": "What is the capital of France?"}
STARTED = 300.0
"""Maximum seconds of the first start, which quantises the base."""


@dataclass(frozen=True)
class Served:
    """A server process, and what it printed when it was ready."""

    process: subprocess.Popen[str]
    url: str
    curl: str

    @property
    def sdk(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def root(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The servers' data folder, and two adapters: ``red`` and ``green``."""
    root = tmp_path_factory.mktemp("demo")
    (root / "data").mkdir()
    (root / "data" / "bases").symlink_to(demo_root / "bases")
    for seed, name in enumerate(("red", "green")):
        write_adapter(root / "adapters" / name, DEMO_LAYOUT, seed=seed, lora_alpha=0.5)
    return root


@contextmanager
def serving(root: Path, *, plain: bool = False) -> Iterator[Served]:
    """``manylora serve`` on a free port; ``plain``: as it is by itself, without adapters."""
    command = [
        sys.executable,
        "manylora.py",
        "serve",
        "--port",
        "0",
        "--data-dir",
        str(root / "data"),
        "--threads",
        "2",
    ]
    options = [
        "--adapter",
        f"red={root}/adapters/red",
        "--adapter-root",
        str(root / "adapters"),
        "--max-model-len",
        "2048",
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, *(() if plain else options)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )
    try:
        yield _welcomed(process)
    finally:
        process.kill()
        process.communicate()


def _welcomed(process: subprocess.Popen[str]) -> Served:
    assert process.stdout is not None
    deadline = time.monotonic() + STARTED
    url = ""
    for line in process.stdout:
        assert time.monotonic() < deadline
        if line.startswith("serving "):
            url = line.split(" on ")[1].split(";")[0]
        if line.startswith("curl "):
            return Served(process, url, line.strip())
    raise AssertionError("it ended before it served")


def test_curl_and_the_sdk_get_answers(root: Path) -> None:
    with serving(root) as served, served.sdk as sdk, httpx.Client(base_url=served.url, timeout=120) as http:
        check_conversation(served, sdk)
        check_adapters(sdk, http)


def check_conversation(served: Served, sdk: OpenAI) -> None:
    if shutil.which("curl"):
        said = subprocess.run(shlex.split(served.curl), capture_output=True, text=True, check=True, timeout=120)
        assert "Paris" in said.stdout
    whole = sdk.chat.completions.create(
        model="smollm2-135m-instruct", messages=[QUESTION], temperature=0, max_tokens=30
    )
    assert whole.choices[0].message.content is not None
    assert "Paris" in whole.choices[0].message.content
    assert whole.usage is not None
    pieces, usage = [], None
    stream = sdk.chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[QUESTION],
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def check_adapters(sdk: OpenAI, http: httpx.Client) -> None:
    assert http.post("/v1/adapters", json={"name": "green", "path": "green"}).status_code == 201
    assert [model.id for model in sdk.models.list()] == ["smollm2-135m-instruct", "green", "red"]
    every = sdk.models.list(extra_query={"versions": True})
    assert [model.id for model in every] == ["smollm2-135m-instruct", "green", "green@1", "red", "red@1"]
    answers = set()
    mix = [{"name": "red", "weight": 0.7}, {"name": "green", "weight": 0.3}]
    for adapter in (None, "red", "green", mix):
        answer = sdk.completions.create(
            model="smollm2-135m-instruct",
            prompt="The capital of France is",
            temperature=0,
            max_tokens=48,
            extra_body={"adapter": adapter, "ignore_eos": True},
        )
        answers.add(answer.choices[0].text)
    assert len(answers) == 4


def test_an_idle_server_takes_less_than_a_gigabyte(root: Path) -> None:
    """Anonymous memory only: 0.1 to 0.2 GB of torch's libraries are resident or not, depending on the page cache."""
    with serving(root, plain=True) as served:
        assert own_memory(served.process.pid) < 0.9e9
        served.sdk.chat.completions.create(model="smollm2-135m-instruct", messages=[QUESTION], max_tokens=32)  # type: ignore[list-item]
        assert own_memory(served.process.pid) < 0.9e9


def own_memory(pid: int) -> int:
    """Return the bytes of resident anonymous memory."""
    memory = psutil.Process(pid).memory_info()
    return memory.rss - memory.shared


def test_sigterm_drains_and_exits_0(root: Path) -> None:
    with serving(root) as served, httpx.Client(base_url=served.url, timeout=120) as http:
        body = {"prompt": "Once", "max_tokens": 60, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: http.get("/readyz").status_code == 503)
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert served.process.wait(30) == 0


def test_a_second_signal_ends_it_at_once(root: Path) -> None:
    with serving(root) as served, httpx.Client(base_url=served.url, timeout=120) as http:
        body = {"prompt": "Once", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: http.get("/readyz").status_code == 503)
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(10) == -signal.SIGTERM
