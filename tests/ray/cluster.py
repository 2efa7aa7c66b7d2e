"""A cluster of replicas on this machine, started by the command, of a tiny random model, over one PostgreSQL."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bases.base import make_base
from server.api.startup import open_service
from server.config import Settings
from tests.tiny import save_adapter, tiny_model, tiny_tokenizer

START_SECONDS = 300
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ENGINE = "ray::ServeReplica:manylora:engine"
"""Beginning of the name of a replica's process."""


@dataclass(frozen=True)
class World:
    """What the clusters of a test run share."""

    root: Path
    database: str

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def store(self) -> str:
        return f"file://{self.root / 'store'}"

    def adapter(self, name: str, seed: int) -> Path:
        """Write a new adapter."""
        return save_adapter(tiny_model(), self.root / name, seed, **LORA)


def make_world(root: Path, database: str, names: Sequence[str]) -> World:
    """Write the model, and register adapters with a server of its own, whose replicas have not loaded any."""
    world = World(root, database)
    model = tiny_model()
    model.save_pretrained(world.model)
    tiny_tokenizer().save_pretrained(world.model)
    plain = {"quantization": "none", "dtype": "fp32", "device": "cpu", "kv_memory_gib": 0.01, "threads": 1}
    adapters = {name: world.adapter(name, seed) for seed, name in enumerate(names)}
    settings = Settings(
        data_dir=root / "alone", database_url=database, store_url=world.store, adapter=adapters, **plain
    )
    open_service(make_base(model, tiny_tokenizer(), "model"), settings).close()
    return world


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    process: subprocess.Popen[bytes]
    url: str
    http: httpx.Client

    def engines(self) -> list[psutil.Process]:
        """The processes of the replicas, those that have not finished starting included."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.is_running() and ENGINE in " ".join(_command_line(child))]

    def samples(self, name: str, headers: Mapping[str, str] | None = None) -> Counter[str]:
        """The values of a metric by replica, those of other labels added up."""
        found: Counter[str] = Counter()
        for line in self.http.get("/metrics", headers=headers).text.splitlines():
            if match := re.fullmatch(rf'{name}{{replica="(\w+)".*}} (\S+)', line):
                found[match[1]] += float(match[2])
        return found

    def complete(self, **fields: object) -> httpx.Response:
        body = {"prompt": "Once upon", "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}
        return self.http.post("/v1/completions", json=body)

    def answering(self) -> int:
        """How many replicas answer."""
        return len(self.samples("manylora_requests_running"))

    def push(self, name: str, folder: Path, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Upload an adapter."""
        paths = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
        files = [("file", (path.name, path.read_bytes())) for path in paths]
        return self.http.post("/v1/adapters", data={"name": name}, files=files, headers=headers)

    def wait_replicas(self, count: int) -> None:
        """Wait until so many replicas answer."""
        wait_for(lambda: self.answering() == count)


@contextmanager
def cluster(world: World, replicas: int, *options: str) -> Iterator[Cluster]:
    """Start ``manylora ray`` and end it with SIGTERM. Ray counts more cores than there are: a replica takes one."""
    port = _free_port()
    command = [sys.executable, "-m", "manylora", "ray", "--replicas", str(replicas), "--threads", "1"]
    command += ["--model", str(world.model), "--quantization", "none", "--dtype", "fp32", "--kv-memory-gib", "0.01"]
    command += ["--data-dir", str(world.root / "data"), "--database-url", world.database, "--store-url", world.store]
    command += ["--port", str(port), "--max-device-adapters", "32", *options]
    environment = {**os.environ, "RAY_OVERRIDE_RESOURCES": '{"CPU": 8}', "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(command, env=environment, process_group=0) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
                running = Cluster(process, f"http://127.0.0.1:{port}", http)
                wait_for(lambda: process.poll() is None and _answers(http))
                running.wait_replicas(replicas)
                yield running
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` is true; fail after :data:`START_SECONDS`."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
