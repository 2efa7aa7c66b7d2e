"""Servers that share a registry are restarted one after the other under load, and no request fails."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGTERM
from typing import Any

import httpx
import pytest

from tests.api.forks import Forked, Forks
from tests.api.live import PATIENCE, request, wait_for
from tests.postgres import postgres
from tests.tiny import save_adapter, tiny_model

TINY = "tests.api.operation.servers:tiny"
LOOK_EVERY = 0.2
"""Seconds between two looks of the balancer at the readiness of a server."""
DELAY = 5.0
"""Seconds in which a server that leaves still takes requests: several looks of the balancer."""
WORKERS = 6


class Balancer:
    """Chooses servers as a load balancer does: in turn, among those that were ready when it last looked.

    It never sends a request twice, so that none that fails goes unseen.
    """

    def __init__(self) -> None:
        self._ready: list[str] = []
        self._servers: list[str] = []
        self._turn = itertools.count()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def add(self, server: Forked) -> None:
        """Send requests there from its next readiness on."""
        self._servers.append(str(server.http.base_url))

    def remove(self, server: Forked) -> None:
        """Forget a server that has ended."""
        self._servers.remove(str(server.http.base_url))

    def choose(self) -> str:
        """The address of the server whose turn it is."""
        ready = self._ready
        return ready[next(self._turn) % len(ready)]

    def sends_to(self, server: Forked) -> bool:
        return str(server.http.base_url) in self._ready

    def _look(self) -> None:
        with httpx.Client(timeout=2) as client:
            while not self._stopped.wait(LOOK_EVERY):
                self._ready = [address for address in list(self._servers) if _is_ready(client, address)]

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._thread.join()


def _is_ready(client: httpx.Client, address: str) -> bool:
    try:
        return client.get(f"{address}/readyz").status_code == 200
    except httpx.TransportError:
        return False


class Load:
    """Threads that send requests to a balancer until they are told to stop. What fails raises in :meth:`stop`."""

    def __init__(self, balancer: Balancer, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._balancer = balancer
        self._stopped = threading.Event()
        self.answers = 0
        self.registered: list[str] = []
        """Names of the adapters whose registration was acknowledged."""
        self._futures: list[Future[None]] = [pool.submit(self._ask, number) for number in range(WORKERS)]
        self._futures.append(pool.submit(self._register, folder))

    def stop(self) -> None:
        self._stopped.set()
        for future in self._futures:
            future.result()

    def _ask(self, number: int) -> None:
        """Whole answers and streams in turn, on connections that are kept open."""
        with httpx.Client(timeout=PATIENCE) as client:
            for turn in itertools.count(number):
                if self._stopped.is_set():
                    return
                body = request(adapter="legal" if turn % 3 else None, stream=bool(turn % 2))
                answer = client.post(f"{self._balancer.choose()}/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert not turn % 2 or answer.text.endswith("data: [DONE]\n\n"), answer.text
                self.answers += 1

    def _register(self, folder: Path) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not self._stopped.wait(0.2):
                name = f"extra-{len(self.registered)}"
                files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
                server = self._balancer.choose()
                answer = client.post(f"{server}/v1/adapters", data={"name": name}, files=files)
                assert answer.status_code == 201, answer.text
                self.registered.append(name)


def restart(servers: list[Forked], at: int, new: Forked, balancer: Balancer) -> None:
    """Put ``new`` in the place of a server: it comes first, the old one leaves, and ends by itself."""
    balancer.add(new)
    wait_for(lambda: balancer.sends_to(new))
    old, servers[at] = servers[at], new
    old.send(SIGTERM)
    assert old.wait() == 0
    balancer.remove(old)


@pytest.mark.slow
def test_rolling_restart_under_load_fails_no_request(forks: Forks, tmp_path: Path) -> None:
    """Every server is replaced twice; what was registered meanwhile is served by those that come after."""
    folder = save_adapter(tiny_model(), tmp_path / "legal", seed=1, r=2, target_modules=["q_proj"])
    balancer, numbers = Balancer(), itertools.count()
    with postgres() as database, ExitStack() as stack, ThreadPoolExecutor(WORKERS + 1) as pool:
        shared: dict[str, Any] = {"database_url": database.fresh(), "store_url": f"file://{tmp_path}/shared"}

        def start() -> Forked:
            root = tmp_path / str(next(numbers))
            return stack.enter_context(forks.server(TINY, root, drain_delay_seconds=DELAY, **shared))

        servers = [start(), start()]
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        servers[0].http.post("/v1/adapters", data={"name": "legal"}, files=files).raise_for_status()
        wait_for(lambda: servers[1].http.post("/v1/completions", json=request(adapter="legal")).is_success)
        for server in servers:
            balancer.add(server)
        with balancer.running():
            wait_for(lambda: all(balancer.sends_to(server) for server in servers))
            load = Load(balancer, folder, pool)
            try:
                for at in (0, 1, 0, 1):
                    answered = load.answers
                    restart(servers, at, start(), balancer)
                    wait_for(lambda answered=answered: load.answers > answered + 20)
            finally:
                load.stop()
        assert len(load.registered) > 5
        for server in servers:
            for name in load.registered:
                answer = server.http.post("/v1/completions", json=request(adapter=name, max_tokens=1))
                assert answer.status_code == 200, answer.text


def test_a_server_that_leaves_is_not_ready_first_and_still_answers(forks: Forks, tmp_path: Path) -> None:
    with forks.server(TINY, tmp_path, drain_delay_seconds=1.5) as server:
        assert server.http.get("/readyz").status_code == 200
        server.send(SIGTERM)
        began = time.monotonic()
        wait_for(lambda: server.http.get("/readyz").status_code == 503)
        answer = server.http.post("/v1/completions", json=request())
        assert time.monotonic() - began < 1.5, "too slow a machine for this test"
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert server.http.get("/readyz").json() == {"status": "draining"}
        assert server.wait() == 0
        assert time.monotonic() - began >= 1.5
