"""Streams: what clients may rely on, keep-alive comments, progress, and errors after the first byte."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.api.generation import submit
from tests.api.live import ADAPTERS, Live, enduring_model, request, running, tiny_service, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = ["naïve café", "日本語のテキスト", "🙂🚀👩\u200d👩\u200d👧", "Ünïcödé", "русский", "plain", "한국어", "[1]\n\n"]


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Live]:
    """A server with one place in the batch, so that a second request waits."""
    with running(tiny_service(tmp_path, enduring_model(), max_batch_sequences=1, drain_seconds=0)) as live:
        yield live


@contextmanager
def occupied(live: Live) -> Iterator[None]:
    """Keep the only place in the batch."""
    with live.http.stream("POST", COMPLETIONS, json=request(max_tokens=15_000, stream=True)) as response:
        lines = response.iter_lines()  # httpx closes the connection with the last reference
        next(lines)
        yield


def test_a_joined_stream_is_the_whole_answer(live: Live) -> None:
    """100 prompts with emoji and CJK text, for the base and all adapters, many at once."""
    adapters = [None, *ADAPTERS]
    bodies: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": f"{WORDS[n % len(WORDS)]} {n}"}],
            "adapter": adapters[n % len(adapters)],
            "max_tokens": 24,
            "temperature": 0,
        }
        for n in range(100)
    ]

    def streamed(body: dict[str, Any]) -> str:
        chunks = live.stream(CHAT, **body)
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    def whole(body: dict[str, Any]) -> str:
        content: str = live.http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
        return content

    with ThreadPoolExecutor(8) as pool:
        both = list(zip(pool.map(streamed, bodies), pool.map(whole, bodies), strict=True))
    assert [left for left, right in both if left != right] == []
    assert len({right for _, right in both}) > 90


def test_chunks_of_one_stream_agree(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    events = live.stream(CHAT, **body, stream_options={"include_usage": True})
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-2]["choices"][0]["delta"] == {}
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0


def test_usage_in_every_chunk(live: Live) -> None:
    events = live.stream(**request(n=2), stream_options={"continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 24


def test_a_silent_stream_gets_comments(busy: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "SILENCE", 0.05)
    first = ExitStack()
    first.enter_context(occupied(busy))
    with first, busy.http.stream("POST", COMPLETIONS, json=request(stream=True)) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines) for _ in range(6)][::2] == [": waiting, 0 of 16 prompt tokens computed"] * 3
        first.close()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_progress_on_request(busy: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PROGRESS", 0.02)
    body = request(prompt="x" * 3000, stream=True, stream_options={"progress": True})
    with busy.http.stream("POST", COMPLETIONS, json=body) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert progress, "3,000 tokens are many steps"
    assert all(each["total"] == 3000 for each in progress)
    done = [each["processed"] for each in progress]
    assert done == sorted(done)
    assert 0 < done[-1] <= 3000
    assert all(chunk["choices"] == [] for chunk in chunks if "prompt_progress" in chunk)


def test_an_error_after_a_comment_is_an_event(busy: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "SILENCE", 0.05)
    with occupied(busy), busy.http.stream("POST", COMPLETIONS, json=request(stream=True)) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(": waiting")
        busy.server.drain()
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    wait_for(lambda: not busy.thread.is_alive())


def test_an_error_before_the_first_token_has_its_status(busy: Live) -> None:
    with occupied(busy), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(busy.http.post, COMPLETIONS, json=request(stream=True))
        wait_for(lambda: busy.service.engine.stats().waiting)
        busy.server.drain()
        assert waiting.result().status_code == 503
    wait_for(lambda: not busy.thread.is_alive())
