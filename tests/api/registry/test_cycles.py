"""Register, ask four at once, delete, over and over: memory and disk stay flat, every lease comes back.

What a deleted name leaves is one row, so that its version numbers never come twice. That, the audit log and the usage
of each version are all that may grow.
"""

import gc
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path

import httpx
import psutil
import pytest

from tests.adapter_folders import write_adapter
from tests.api.live import PATIENCE, Live, request, running, tiny_service, wait_for
from tests.api.registry.test_adapters import upload

AT_ONCE = 4
WARM_UP = 100
"""Cycles until memory is stable."""
GROWTH = 4 << 20
"""Maximum growth in 400 cycles, client and server together, in bytes. Measured: 0.3 to 0.7 MiB."""
NAME_BYTES = 256
"""Maximum bytes of the database's file for each name that ever existed. Measured: 86."""
CYCLE_BYTES = 1024
"""Maximum bytes of the database's file for each cycle: two entries of the audit log, one of usage, their indexes."""
PAGES = 192 << 10
"""Maximum growth of the database's file that does not depend on names, in bytes."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    with running(tiny_service(tmp_path, max_device_adapters=3, host_cache_gib=1e-3, max_rank=16)) as live:
        yield live


@pytest.mark.parametrize(
    ("names", "cycles"),
    [
        ("many", 25),
        pytest.param("one", 500, marks=pytest.mark.slow),
        pytest.param("many", 500, marks=pytest.mark.slow),
    ],
)
def test_cycles(server: Live, tmp_path: Path, names: str, cycles: int) -> None:
    before = 0
    with ThreadPoolExecutor(AT_ONCE) as threads, httpx.Client(base_url=server.http.base_url, timeout=PATIENCE) as http:
        for number in range(cycles):
            cycle(server, http, threads, tmp_path, f"n{number}" if names == "many" else "legal", seed=number)
            if number == WARM_UP:
                before = resident_bytes()
    wait_for(server.idle)
    registry = server.service.registry
    assert (registry._leases, registry._held, registry._idle) == (Counter(), Counter(), set())
    assert (registry._snapshot.entries, registry._snapshot._order, registry._snapshot._users) == ({}, [], {})
    wait_for(lambda: stored(server) == {".lock"})
    wait_for(lambda: not server.service.engine.stats().device_adapters | server.service.engine.stats().host_adapters)
    server.service.engine.check()
    assert rows(server) == {"names": cycles if names == "many" else 1, "versions": 0, "contents": 0, "admissions": 0}
    assert database_bytes(server) < PAGES + CYCLE_BYTES * cycles + NAME_BYTES * (cycles if names == "many" else 1)
    grown = resident_bytes() - before if before else 0
    sys.stdout.write(f"{names}: grew by {grown / 2**20:.1f} MiB; database {database_bytes(server)} bytes\n")
    assert grown < GROWTH, f"grew by {grown >> 20} MiB"


def cycle(live: Live, http: httpx.Client, threads: ThreadPoolExecutor, root: Path, name: str, seed: int) -> None:
    """Register, use and remove an adapter: two whole responses, two streams, one of them abandoned."""
    folder = write_adapter(root / "adapter", live.service.base.layout, seed=seed)
    card = upload(live, folder, name=name).raise_for_status().json()
    answers = [threads.submit(ask, http, name) for _ in range(2)]
    streams = [threads.submit(stream, http, name, pieces) for pieces in (3, None)]
    contents = {answer.result() for answer in [*answers, *streams]}
    assert contents == {card["content"]}
    live.http.delete(f"/v1/adapters/{name}").raise_for_status()
    assert http.post("/v1/completions", json=request(adapter=name)).status_code == 404


def ask(http: httpx.Client, name: str) -> str:
    response = http.post("/v1/completions", json=request(adapter=name)).raise_for_status()
    return str(response.json()["adapter"][0]["id"])


def stream(http: httpx.Client, name: str, pieces: int | None) -> str:
    """Read this many pieces and disconnect; None reads all."""
    with http.stream("POST", "/v1/completions", json=request(adapter=name, max_tokens=60, stream=True)) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        for seen in count():
            if next(lines, None) is None or seen == pieces:
                break
        return response.headers["x-manylora-adapter"].partition("=")[2]


def resident_bytes() -> int:
    """Return this process's resident memory in bytes."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def stored(live: Live) -> set[str]:
    return {path.name for path in live.service.store.root.iterdir()}


def rows(live: Live) -> dict[str, int]:
    """Of the tables that describe adapters."""
    with closing(sqlite3.connect(live.service.settings.data_dir / "registry.sqlite3")) as connection:
        tables = ("names", "versions", "contents", "admissions")
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


def database_bytes(live: Live) -> int:
    """Of the database's file, without its log, which has a bound of its own."""
    with closing(sqlite3.connect(live.service.settings.data_dir / "registry.sqlite3")) as connection:
        connection.execute("PRAGMA wal_checkpoint")
    return (live.service.settings.data_dir / "registry.sqlite3").stat().st_size
