"""Two servers on one database hold the limits of a key together, and one outlives the other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIGKILL

import httpx
import pytest

from server.access.key_share import AHEAD_SECONDS
from tests.api.access.callers import caller
from tests.api.forks import Forked, Forks
from tests.api.live import PATIENCE, Live, enduring_model, request, running, tiny_service, wait_for
from tests.postgres import postgres

ENDURING = "tests.api.operation.servers:enduring"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Pair:
    """Two servers on one database; ``other`` is a process of its own."""

    live: Live
    other: Forked

    @contextmanager
    def clients(self, **limits: int) -> Iterator[list[httpx.Client]]:
        """Yield a client of each server, both with the same new key."""
        with caller(self.live, **limits) as limited:
            headers = {"authorization": f"Bearer {limited.secret}"}
            with httpx.Client(base_url=self.other.http.base_url, timeout=PATIENCE, headers=headers) as other:
                wait_for(lambda: _knows_the_key(other))
                yield [limited.http, other]


def _knows_the_key(client: httpx.Client) -> bool:
    """Whether the server has read the client's key. Before it knows of any key, it answers everybody."""
    response = client.get("/v1/whoami")
    return response.status_code == 200 and response.json()["keys"] is True


@pytest.fixture(scope="module")
def pair(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("pair")
    with postgres() as database:
        shared = {"database_url": database.fresh(), "store_url": f"file://{root}/shared"}
        service = tiny_service(root / "one", enduring_model(), cpu="torch", max_model_len=16384, **shared)
        with running(service) as live, forks.server(ENDURING, root / "two", **shared) as other:
            yield Pair(live, other)


def test_requests_a_minute_are_those_of_both_servers(pair: Pair) -> None:
    # Five requests for each server are too few to be busy, and so neither takes ahead what the other needs.
    with pair.clients(requests_per_minute=10) as clients:
        began = time.monotonic()
        answers = [clients[number % 2].post(COMPLETIONS, json=request(max_tokens=1)) for number in range(20)]
        seconds = time.monotonic() - began
        admitted = [answer for answer in answers if answer.status_code == 200]
        assert 10 <= len(admitted) <= 10 * (1 + (seconds + AHEAD_SECONDS) / 60)
        assert {answer.status_code for answer in answers[:10]} == {200}
        left = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
        for used, there in enumerate(left[:10], 1):
            assert 10 - used <= there <= 10 - used + 1 + seconds / 6, left
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "on requests per min (RPM): limit 10, used 10, requested 1" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 6


def test_tokens_a_minute_are_those_of_both_servers(pair: Pair) -> None:
    with pair.clients(tokens_per_minute=600) as (one, other):
        # What the refused ones lack takes more than half a minute to come back.
        assert one.post(COMPLETIONS, json=request(prompt="x" * 350, max_tokens=50)).status_code == 200
        refused = other.post(COMPLETIONS, json=request(prompt="x" * 450, max_tokens=100))
        assert refused.status_code == 429
        assert "tokens per min (TPM): limit 600, used" in refused.json()["error"]["message"]
        assert other.post(COMPLETIONS, json=request(prompt="x" * 50, max_tokens=50)).status_code == 200
        assert one.post("/v1/embeddings", json={"input": "x" * 590}).status_code == 429


def test_a_server_that_is_killed_gives_its_parallel_requests_back(pair: Pair) -> None:
    # The last test: one server is gone after it.
    stream = request(max_tokens=12_000, stream=True)
    with (
        pair.clients(parallel_requests=2) as (one, other),
        one.stream("POST", COMPLETIONS, json=stream) as mine,
        other.stream("POST", COMPLETIONS, json=stream) as its,
    ):
        assert (mine.status_code, its.status_code) == (200, 200)
        lines = its.iter_lines()
        next(lines)
        refused = one.post(COMPLETIONS, json=request())
        assert refused.status_code == 429
        assert "parallel requests: limit 2, running 2" in refused.json()["error"]["message"]
        pair.other.send(SIGKILL)
        pair.other.wait()
        with pytest.raises(httpx.HTTPError):
            list(lines)
        wait_for(lambda: one.post(COMPLETIONS, json=request(max_tokens=1)).status_code == 200)
