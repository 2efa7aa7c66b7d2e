"""Keys are tenants, over HTTP: they share the server's time, and no prefixes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.access.callers import Caller, caller
from tests.api.live import Live, enduring_model, request, running, tiny_service, wait_for
from tests.api.telemetry.samples import value

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with one place in the batch."""
    service = tiny_service(tmp_path_factory.mktemp("narrow"), enduring_model(), max_batch_sequences=1)
    with running(service) as live:
        yield live


def cached(key: Caller, prompt: str) -> int:
    """Ask, and return how many tokens of the prompt were in the prefix cache."""
    response = key.http.post(COMPLETIONS, json=request(prompt=prompt, max_tokens=1))
    assert response.status_code == 200, response.text
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_a_key_finds_no_prefix_of_another(narrow: Live) -> None:
    """Neither in its answer's usage, nor, therefore, in its time."""
    prompt = "A prompt that is longer than a few blocks of keys and values, and that both keys send."
    with caller(narrow) as one, caller(narrow) as other:
        assert cached(one, prompt) == 0
        assert cached(one, prompt) >= 32
        assert cached(other, prompt) == 0
        assert cached(other, prompt) >= 32
    wait_for(narrow.idle)


def test_two_keys_take_turns(narrow: Live) -> None:
    """Six requests of one key are there before three of another, which do not wait for all of them."""
    ended: list[str] = []

    def ask(name: str, key: Caller, number: int) -> None:
        fields = request(prompt=f"{name} {number}", max_tokens=40)
        assert key.http.post(COMPLETIONS, json=fields).status_code == 200
        ended.append(name)

    def wait_until(number: int) -> None:
        wait_for(lambda: narrow.service.engine.stats().waiting == number)

    with (
        caller(narrow) as holds,
        caller(narrow) as many,
        caller(narrow) as few,
        caller(narrow, "metrics") as watches,
        ThreadPoolExecutor(10) as pool,
    ):
        pool.submit(holds.http.post, COMPLETIONS, json=request(max_tokens=15_000, timeout=3.0))
        wait_for(lambda: narrow.service.engine.stats().running == 1)
        asked = [pool.submit(ask, "many", many, number) for number in range(6)]
        wait_until(6)
        assert value(watches.http, "manylora_tenants_waiting") == 1
        asked += [pool.submit(ask, "few", few, number) for number in range(3)]
        wait_until(9)
        assert value(watches.http, "manylora_tenants_waiting") == 2
        for each in asked:
            each.result()
        assert value(watches.http, "manylora_tenants_waiting") == 0
        assert value(watches.http, "manylora_deadlines_exceeded_total") == 1
    assert ended[:6].count("few") == 3, ended
    wait_for(narrow.idle)
