"""What clients see of a request that makes steps fail, of too little memory, and of a full queue."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.sequence import Batch, StepResult
from tests.api.generation.test_lifecycle import begin, unanswered
from tests.api.live import Live, enduring_model, request, running, tiny_service, wait_for

POISON = "Make the step fail"
LARGE = "Take all memory"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose steps fail with a prompt that begins with one of these texts: at once, or after ten tokens."""
    service = tiny_service(tmp_path_factory.mktemp("faulty"))
    run: Callable[[Batch], StepResult] = service.engine.runner.run
    marks = {text: service.codec.backend.encode(text).ids for text in (POISON, LARGE)}

    def asks(batch: Batch, text: str) -> bool:
        return any(
            chunk.sequence.tokens[: len(marks[text])] == marks[text]
            and chunk.sequence.output_length >= (10 if chunk.sequence.sampling.seed == 10 else 0)
            for chunk in batch.chunks
        )

    def fails(batch: Batch) -> StepResult:
        result = run(batch)
        if asks(batch, POISON):
            raise ValueError("no step for this one")
        if asks(batch, LARGE):
            bytearray(2**58)
        return result

    service.engine.runner.run = fails  # type: ignore[method-assign]
    with running(service) as live:
        yield live


def error(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    return found


def test_a_poisoned_request_fails_alone(faulty: Live, caplog: pytest.LogCaptureFixture) -> None:
    """Its neighbours' answers are those of solo runs, also when it is tried again and again."""
    prompts = [f"Neighbour {number} of a" for number in range(6)]
    alone = [faulty.text(prompt=prompt, max_tokens=60) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(faulty.text, prompt=prompt, max_tokens=60) for prompt in prompts]
        for _ in range(4):
            answer = faulty.http.post("/v1/completions", json=request(prompt=POISON))
            assert answer.status_code == 500, answer.text
            assert error(answer)["code"] == "poisoned_request"
            assert error(answer)["type"] == "server_error"
            assert "cmpl-" in error(answer)["message"], "it names the request, and so do the lines of the log"
            assert "no step for this one" not in answer.text
            assert answer.headers["x-should-retry"] == "false"
        assert [each.result() for each in good] == alone
    (id_,) = {word for word in error(answer)["message"].replace(";", " ").split() if word.startswith("cmpl-")}
    assert f"No step succeeds with {id_}" in caplog.text
    assert "no step for this one" in caplog.text
    assert faulty.http.get("/readyz").status_code == 200


def test_a_stream_that_is_poisoned_later_ends_with_an_error(faulty: Live) -> None:
    body = request(prompt=POISON, seed=10, max_tokens=40, stream=True)
    with faulty.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line and line[0] != ":"]
    assert response.status_code == 200
    assert json.loads(lines[-1])["error"]["code"] == "poisoned_request"
    assert len(lines) > 5


def test_a_request_without_memory_is_503(faulty: Live) -> None:
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(faulty.text, prompt="Beside it", max_tokens=40)
        answer = faulty.http.post("/v1/completions", json=request(prompt=LARGE))
        assert neighbour.result() == faulty.text(prompt="Beside it", max_tokens=40)
    assert answer.status_code == 503, answer.text
    assert error(answer)["code"] == "out_of_memory"
    assert answer.headers["retry-after"] == "5"
    assert faulty.service.engine.stats().out_of_memory > 0
    assert faulty.http.get("/livez").status_code == 200


def test_waiting_tokens_are_bounded_and_retry_after_follows_the_pace(tmp_path: Path) -> None:
    service = tiny_service(tmp_path, enduring_model(), max_queue_tokens=40, max_batch_sequences=1, max_model_len=16384)
    with running(service) as live, ExitStack() as stack:
        begin(live, stack)
        stack.enter_context(unanswered(live, request(prompt="x" * 30)))
        wait_for(lambda: live.service.engine.stats().waiting == 1)
        refused = live.http.post("/v1/completions", json=request(prompt="x" * 11))
        assert refused.status_code == 429
        assert "prompt tokens" in error(refused)["message"]
        assert error(refused)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        stack.enter_context(unanswered(live, request(prompt="x" * 10)))
        wait_for(lambda: live.service.engine.stats().waiting == 2)
