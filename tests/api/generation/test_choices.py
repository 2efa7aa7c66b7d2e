"""Several choices and several prompts in one request: each as if it were alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.api.generation.sampling import params_of_choice
from server.engine.sequence import SamplingParams
from tests.api.live import ADAPTERS, Live, enduring_model, request, running, tiny_service, wait_for

PROMPTS = ["Once upon a time", "In the year 2000", "🙂 日本語"]


def texts(answer: dict[str, Any]) -> list[str]:
    """Return the texts of the choices; assert that they are in order."""
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def streamed(events: list[dict[str, Any]]) -> list[str]:
    """Return the joined texts of a stream's choices; assert that each has ended once."""
    found: dict[int, str] = {}
    ended: list[int] = []
    for choice in (choice for event in events for choice in event["choices"]):
        assert choice["index"] not in ended, "text after the end"
        found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
        ended += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(ended) == sorted(found)
    return [found[index] for index in sorted(found)]


def test_greedy_choices_are_the_same_answer(live: Live) -> None:
    answer = live.complete(n=3)
    assert texts(answer) == [live.text()] * 3
    assert answer["usage"]["prompt_tokens"] == len("Once upon a time"), "a prompt counts once"
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["total_tokens"] == 52


def test_choices_with_a_seed_are_distinct_and_repeatable(live: Live) -> None:
    sampled = {"temperature": 1.5, "seed": 7, "max_tokens": 20}
    four = texts(live.complete(**sampled, n=4))
    assert len(set(four)) == 4
    assert four == texts(live.complete(**sampled, n=4))
    assert four[:2] == texts(live.complete(**sampled, n=2))
    assert four[0] == live.text(**sampled)
    assert not set(four) & set(texts(live.complete(**sampled | {"seed": 8}, n=4))), "seeds share no draws"


def test_choices_without_a_seed_are_distinct(live: Live) -> None:
    assert len(set(texts(live.complete(temperature=1.5, n=3, max_tokens=20)))) == 3


def test_seeds_of_choices() -> None:
    params = SamplingParams(seed=-5)
    seeds = [params_of_choice(params, number).seed for number in range(100)]
    assert seeds[0] == -5
    assert len(set(seeds)) == 100
    assert params_of_choice(SamplingParams(), 3).seed is None


@pytest.mark.parametrize("as_tokens", [False, True])
def test_each_prompt_is_answered_as_if_alone(live: Live, as_tokens: bool) -> None:
    codec = live.service.codec
    prompts = [codec.encode_prompt(prompt) for prompt in PROMPTS] if as_tokens else PROMPTS
    answer = live.complete(prompt=prompts, n=2)
    alone = [live.text(prompt=prompt) for prompt in PROMPTS]
    assert texts(answer) == [alone[0], alone[0], alone[1], alone[1], alone[2], alone[2]]
    assert answer["usage"]["prompt_tokens"] == sum(len(codec.encode_prompt(prompt)) for prompt in PROMPTS)
    assert live.complete(prompt=[PROMPTS[0], codec.encode_prompt(PROMPTS[1])])["choices"][1]["text"] == alone[1]


def test_a_stream_of_several_choices(live: Live) -> None:
    body = request(prompt=PROMPTS, n=2, temperature=1.5, seed=3, max_tokens=30)
    events = live.stream(**body, stream_options={"include_usage": True})
    assert streamed(events) == texts(live.complete(**body))
    assert events[-1]["usage"]["completion_tokens"] == 180
    assert len({(event["id"], event["created"]) for event in events}) == 1


def test_a_chat_stream_opens_each_choice_with_the_role(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "Why?"}], "n": 3, "max_tokens": 8, "ignore_eos": True, "seed": 1}
    events = live.stream("/v1/chat/completions", **body)
    whole = live.http.post("/v1/chat/completions", json=body).json()
    for index in range(3):
        choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in deltas[1:])
        assert (deltas[-1], choices[-1]["finish_reason"]) == ({}, "length")
        content = "".join(delta.get("content", "") for delta in deltas)
        assert content == whole["choices"][index]["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_only_its_choice(live: Live, stream: bool) -> None:
    body = request(temperature=1.5, seed=5, n=4, max_tokens=40)
    whole = texts(live.complete(**body))
    stop = next(text[5:7] for text in whole if sum(text[5:7] in other for other in whole) < 3)
    got = streamed(live.stream(**body, stop=stop)) if stream else texts(live.complete(**body, stop=stop))
    assert got == [text.partition(stop)[0] for text in whole]


def test_choices_of_many_adapters_at_once_equal_their_solo_runs(live: Live) -> None:
    wanted: list[dict[str, Any]] = [
        request(adapter=adapter, prompt=prompt, n=3, temperature=1.2, seed=11, max_tokens=25)
        for adapter in (None, *ADAPTERS, [{"name": "red", "weight": 0.5}, {"name": "green"}])
        for prompt in PROMPTS
    ]
    with ThreadPoolExecutor(8) as pool:
        together = [texts(answer) for answer in pool.map(lambda body: live.complete(**body), wanted)]
    assert together == [texts(live.complete(**body)) for body in wanted]
    assert len({tuple(each) for each in together}) == len(wanted)


def test_best_of_returns_the_most_likely_answers(live: Live) -> None:
    body = request(temperature=1.5, seed=2, max_tokens=10, logprobs=0)
    every = live.complete(**body, n=6)["choices"]
    ranked = sorted(every, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    best = live.complete(**body, n=2, best_of=6)
    assert texts(best) == [choice["text"] for choice in ranked[:2]]
    assert best["usage"]["completion_tokens"] == 60
    without = live.complete(**{**body, "logprobs": None}, best_of=6)
    assert texts(without) == [ranked[0]["text"]]
    assert without["choices"][0]["logprobs"] is None
    assert texts(live.complete(**body, best_of=1)) == texts(live.complete(**body))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": ["a"] * 65, "best_of": 2}, "best_of"),
    ],
    ids=str,
)
def test_limits(live: Live, fields: dict[str, Any], param: str) -> None:
    response = live.http.post("/v1/completions", json=request(**fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_as_many_choices_as_allowed(live: Live) -> None:
    assert len(live.complete(prompt=["a", "b"], n=64, max_tokens=2)["choices"]) == 128


def test_a_prompt_that_is_too_long_refuses_the_request(live: Live) -> None:
    response = live.http.post("/v1/completions", json=request(prompt=["fine", "x" * 300]))
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_full_queue_takes_all_choices_or_none(tmp_path: Path) -> None:
    service = tiny_service(tmp_path, enduring_model(), max_queue=1, max_batch_sequences=1)
    with running(service) as live:
        response = live.http.post("/v1/completions", json=request(n=3, max_tokens=15_000))
        assert response.status_code == 429
        wait_for(live.idle)
        assert live.sampled() < 15_000
        assert len(live.complete(n=2, max_tokens=5)["choices"]) == 2


def test_requests_of_every_kind_in_one_batch_equal_their_solo_runs(live: Live) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 3},
        {"n": 3, "temperature": 1.2, "seed": 4},
        {"best_of": 3, "temperature": 1.2, "seed": 4},
        {"structured_outputs": {"regex": "[a-z]{30}"}, "ignore_eos": False},
        {"echo": True, "logprobs": 0},
        {"min_tokens": 12, "stop_token_ids": [5]},
    ]
    wanted = [request(adapter=adapter, max_tokens=20, **kind) for adapter in (None, *ADAPTERS) for kind in kinds]

    def answer(body: dict[str, Any]) -> list[tuple[str, list[int]]]:
        choices = live.complete(**body, return_token_ids=True)["choices"]
        return [(choice["text"], choice["token_ids"]) for choice in choices]

    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(answer, wanted))
    assert together == [answer(body) for body in wanted]
