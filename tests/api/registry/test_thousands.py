"""Ten thousand adapters asleep: what a start, a page, a request and a registration cost beside them. Prints figures.

Registering so many one by one, each flushed to the disk, would take many minutes: here their files are written without
flushing, and their rows in one transaction, as the registry would have left them.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median

import httpx
import psutil
import pytest
from sqlalchemy import insert, update

from adapters.format.spec import BaseLayout
from adapters.format.verify import verify
from adapters.registry import schema
from adapters.registry.database import open_sqlite
from adapters.store.store import AdapterStore, folder_bytes
from bases.base import make_base
from tests.adapter_folders import LAYERS, write_adapter
from tests.api.live import request
from tests.api.registry.test_kill import Zygote, upload
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

SIZES = (16, 1000, 10_000)
HOT = 16
"""Number of adapters under traffic: as many as the smallest registry has."""
TRAFFIC_SECONDS = 8
TOKENS = 64
MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """Figures of a server with this many adapters. Milliseconds are medians."""

    adapters: int
    start_seconds: float
    memory_mib: float
    whole_list_ms: float
    first_page_ms: float
    last_page_ms: float
    adapters_page_ms: float
    hot_ms: float
    cold_ms: float
    tokens_per_second: float
    registration_ms: float
    metrics_ms: float


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    return make_base(tiny_model(), tiny_tokenizer(), "tiny").layout


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote()
    with zygote.server(tmp_path_factory.mktemp("first")):
        pass  # imports do not count as start time
    yield zygote
    zygote.close()


def test_cost_of_thousands_of_adapters(tmp_path: Path, layout: BaseLayout, zygote: Zygote) -> None:
    root, figures, have = tmp_path / "server", [], 0
    extra = [write_adapter(tmp_path / f"extra{seed}", layout, seed=10**6 + seed) for seed in range(5)]
    for size in SIZES:
        fill(root / "data", layout, range(have, size))
        have = size
        figures.append(measured(zygote, root, size, extra))
        sys.stdout.write(f"{asdict(figures[-1])}\n")
    few, _, many = figures
    assert many.start_seconds < few.start_seconds + 10
    assert many.memory_mib < few.memory_mib + 64
    assert many.whole_list_ms < 3000
    for page in ("first_page_ms", "last_page_ms", "metrics_ms", "hot_ms", "cold_ms"):
        assert getattr(many, page) < 2 * getattr(few, page) + 20, page
    assert many.tokens_per_second > few.tokens_per_second / 2
    assert many.registration_ms < few.registration_ms + 200


def fill(data: Path, layout: BaseLayout, numbers: range) -> None:
    """Fill the registry as if the adapters with these numbers had been registered."""
    store = AdapterStore(data / "adapters", layout, max_rank=16)
    database = open_sqlite(data / "registry.sqlite3")
    rows: dict[str, list[dict[str, object]]] = {"contents": [], "names": [], "versions": [], "admissions": []}
    for number in numbers:
        with store.stage() as staging:
            write_adapter(staging, layout, seed=number, rank=1, layers=LAYERS[:1])
            for table, row in described(number, staging, layout).items():
                rows[table].append(row)
            staging.rename(store.path(verify(staging, layout, 16).id))
    with database.writing() as (connection, _revision):
        for table, values in rows.items():
            connection.execute(insert(schema.metadata.tables[table]), values)
        connection.execute(update(schema.registry).values(revision=schema.registry.c.revision + numbers.stop))
    database.close()


def described(number: int, folder: Path, layout: BaseLayout) -> dict[str, dict[str, object]]:
    """Return table -> row of an adapter."""
    spec, name, now = verify(folder, layout, 16), f"n{number:05}", int(time.time())
    sizes = {"size_bytes": spec.size_bytes, "stored_bytes": folder_bytes(folder)}
    shape = {"rank": spec.rank, "targets": len(spec.targets)}
    probe = {"prompt_tokens": 16, "max_logit_change": 1.0, "kl": 0.1, "top_token_changed": True, "seconds": 0.01}
    receipt = {"checked": now, "base_fingerprint": layout.fingerprint, "ignored_files": [], "probe": probe}
    return {
        "contents": {"id": spec.id, **sizes, **shape, "touched": now * 10**6 + number, "deleting": False},
        "names": {"name": name, "folded": name, "kind": "adapter", "active": 1, "last": 1, "pinned": False}
        | {"created": now, "revision": number + 1},
        "versions": {"name": name, "number": 1, "content": spec.id, "created": now, "source": "upload"},
        "admissions": {"content": spec.id, "base": layout.fingerprint, "refused": None, "receipt": receipt},
    }


def measured(zygote: Zygote, root: Path, size: int, extra: list[Path]) -> Figures:
    """Start a server on the filled registry, and measure it."""
    started = time.monotonic()
    with zygote.server(root) as client:
        client.get("/readyz").raise_for_status()
        start_seconds = time.monotonic() - started
        (process,) = psutil.Process(zygote._process.pid).children()
        memory = process.memory_full_info().uss / MIB
        assert len(client.get("/v1/models?versions=true").json()["data"]) == 2 * size + 1
        last = f"n{max(0, size - 11):05}"
        cold = iter(Random(0).sample(range(HOT, size), min(size - HOT, 50)) or [0] * 50)
        for number in range(HOT):
            complete(client, number, 1)
        return Figures(
            adapters=size,
            start_seconds=start_seconds,
            memory_mib=memory,
            whole_list_ms=milliseconds(lambda: client.get("/v1/models?versions=true").raise_for_status(), 5),
            first_page_ms=milliseconds(lambda: client.get("/v1/models?limit=20").raise_for_status()),
            last_page_ms=milliseconds(lambda: client.get(f"/v1/models?limit=20&after={last}").raise_for_status()),
            adapters_page_ms=milliseconds(lambda: client.get("/v1/adapters?limit=20").raise_for_status()),
            hot_ms=milliseconds(lambda: complete(client, 0, 1), 100),
            cold_ms=milliseconds(lambda: complete(client, next(cold), 1)),
            tokens_per_second=throughput(client),
            registration_ms=registering(client, extra),
            metrics_ms=milliseconds(lambda: client.get("/metrics").raise_for_status()),
        )


def milliseconds(call: Callable[[], object], times: int = 30) -> float:
    """Return the median time of a call, in milliseconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return median(taken)


def complete(client: httpx.Client, number: int, tokens: int) -> int:
    answer = client.post("/v1/completions", json=request(adapter=f"n{number:05}", max_tokens=tokens))
    return int(answer.raise_for_status().json()["usage"]["completion_tokens"])


def registering(client: httpx.Client, folders: list[Path]) -> float:
    """Return the milliseconds of an upload; the adapters are removed again."""
    new = iter(folders)
    taken = milliseconds(lambda: upload(client, f"extra/{time.time_ns()}", next(new)).raise_for_status(), len(folders))
    for card in client.get("/v1/adapters?limit=5").json()["data"]:
        client.delete(f"/v1/adapters/{card['id']}").raise_for_status()
    return taken


def throughput(client: httpx.Client) -> float:
    """Return the tokens per second of HOT clients with an adapter each."""
    started = time.monotonic()

    def run(number: int) -> int:
        tokens = 0
        while time.monotonic() < started + TRAFFIC_SECONDS:
            tokens += complete(client, number, TOKENS)
        return tokens

    with ThreadPoolExecutor(HOT) as threads:
        tokens = sum(threads.map(run, range(HOT)))
    return tokens / (time.monotonic() - started)
