"""Completions and chat completions: requests and responses, whole and streamed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.format.spec import AdapterId
from server.text.codec import Codec
from server.text.conversation import Conversation
from server.text.detokenizer import Detokenizer
from tests.api.live import ADAPTERS, Live, request, running, tiny_service
from tests.encoding import encode_chat
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

QUESTION = [{"role": "user", "content": "Why?"}]
CHAT = "/v1/chat/completions"


def chat(live: Live, **fields: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    response = live.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def alone(prompt: list[int], count: int) -> str:
    """Return the answer of transformers' greedy search."""
    model = tiny_model()
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    detokenizer = Detokenizer(Codec(tiny_tokenizer(), VOCABULARY))
    return "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()


def test_base_answer_equals_transformers(live: Live) -> None:
    codec = Codec(tiny_tokenizer(), VOCABULARY)
    assert live.text() == alone(codec.encode_prompt(request()["prompt"]), 12)
    assert chat(live)["choices"][0]["message"]["content"] == alone(encode_chat(codec, Conversation(QUESTION)), 12)


def test_a_prompt_may_be_token_ids(live: Live) -> None:
    ids = Codec(tiny_tokenizer(), VOCABULARY).encode_prompt(request()["prompt"])
    for same in (ids, [ids], [request()["prompt"]]):
        assert live.text(prompt=same) == live.text()


def test_the_shape_of_a_completion(live: Live) -> None:
    answer = live.complete(user="somebody", n=1, logprobs=None)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    assert answer["adapter"] == []
    assert answer["system_fingerprint"] == live.service.fingerprint
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] == len("Once upon a time")
    assert answer["usage"]["total_tokens"] == 28


def test_the_shape_of_a_chat(live: Live) -> None:
    answer = chat(live)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_repeated_prompt_hits_the_prefix_cache(live: Live) -> None:
    prompt = "A long prompt that nobody else in these tests has sent before."
    first, second = (live.complete(prompt=prompt)["usage"]["prompt_tokens_details"] for _ in range(2))
    assert first == {"cached_tokens": 0}
    assert second["cached_tokens"] >= 32


def test_a_stream_is_the_whole_answer_in_pieces(live: Live) -> None:
    answer = live.complete(max_tokens=60)
    events = live.stream(**request(max_tokens=60), stream_options={"include_usage": True})
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == answer["choices"][0]["text"]
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]] == [None] * (len(events) - 2) + ["length"]
    assert len(events) > 10, "all at once is no stream"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 60
    assert all(e["usage"] is None for e in events[:-1])
    assert {(e["id"], e["object"], e["model"]) for e in events} == {(events[0]["id"], "text_completion", "tiny")}


def test_a_chat_stream_opens_with_the_role(live: Live) -> None:
    content = chat(live)["choices"][0]["message"]["content"]
    events = live.stream(CHAT, messages=QUESTION, max_completion_tokens=12, temperature=0, ignore_eos=True)
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == content
    assert all("usage" not in e for e in events)
    assert {e["object"] for e in events} == {"chat.completion.chunk"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(live: Live, stream: bool) -> None:
    text = live.text(max_tokens=40)
    stop = text[20:23]
    assert stop
    wanted = text[: text.index(stop)]
    if stream:
        events = live.stream(**request(max_tokens=40, stop=["no such thing", stop]))
        got, finish = "".join(e["choices"][0]["text"] for e in events), events[-1]["choices"][0]["finish_reason"]
    else:
        choice = live.complete(max_tokens=40, stop=stop)["choices"][0]
        got, finish = choice["text"], choice["finish_reason"]
    assert (got, finish) == (wanted, "stop")


def test_end_token_is_not_part_of_the_answer(live: Live) -> None:
    (end,) = live.service.base.eos_token_ids
    answer = live.complete(logit_bias={str(end): 100}, ignore_eos=False)
    assert answer["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "stop_reason": None
    }  # fmt: skip
    assert answer["usage"]["completion_tokens"] == 1
    assert live.complete(logit_bias={str(end): 100})["choices"][0]["finish_reason"] == "length"


def test_same_seed_repeats_the_answer(live: Live) -> None:
    one, again, other = (live.text(temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_a_chat_without_a_limit_fills_the_context(live: Live) -> None:
    answer = chat(live, max_tokens=None)
    assert answer["usage"]["total_tokens"] == live.service.base.max_model_len
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_completion_without_a_limit_has_16_tokens(live: Live) -> None:
    assert live.complete(max_tokens=None)["usage"]["completion_tokens"] == 16


def test_nulls_are_defaults(live: Live) -> None:
    nulls: Mapping[str, None] = dict.fromkeys(["top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "stream", "n"])
    assert live.text(**nulls) == live.text()


def test_content_parts_and_developers(live: Live) -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert chat(live, messages=[{"role": "user", "content": parts}])["choices"] == chat(live)["choices"]
    system, developer = ([{"role": role, "content": "Be brief."}, *QUESTION] for role in ("system", "developer"))
    assert chat(live, messages=system)["choices"] == chat(live, messages=developer)["choices"]


def test_response_message_can_be_sent_back(live: Live) -> None:
    message = chat(live)["choices"][0]["message"]
    chat(live, messages=[*QUESTION, {**message, "tool_calls": None, "annotations": []}, *QUESTION])


# --- adapters


def test_every_adapter_and_mix_answers_differently(live: Live) -> None:
    mix = [{"name": "red", "weight": 0.7}, {"name": "green", "weight": 0.3}]
    asked: list[Any] = [None, "red", "green", "team/blue", mix, [{"name": "red", "weight": -1}]]
    assert len({live.text(adapter=adapter) for adapter in asked}) == len(asked)


def test_ways_to_name_the_same_adapter(live: Live) -> None:
    ways: list[dict[str, Any]] = [
        {"adapter": "red"},
        {"adapter": [{"name": "red"}]},
        {"adapter": [{"name": "red", "weight": 0.25}, {"name": "red", "weight": 0.75}]},
        {"adapter": [{"name": "red", "weight": 1}, {"name": "green", "weight": 0}]},
        {"model": "red"},
        {"model": "red", "adapter": "red"},
        {"model": "red@1"},
        {"adapter": "red@1"},
        {"model": "tiny", "adapter": "red"},
    ]
    assert len({live.text(**way) for way in ways}) == 1
    assert live.text(model="red", adapter=[{"name": "red", "weight": 0.5}]) == live.text(
        adapter=[{"name": "red", "weight": 0.5}]
    )


def test_ways_to_name_the_base(live: Live) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"model": "tiny"},
        {"adapter": None},
        {"adapter": []},
        {"adapter": [{"name": "red", "weight": 0}]},
        {"adapter": [{"name": "red", "weight": 1}, {"name": "red", "weight": -1}]},
    ]
    assert len({live.text(**way) for way in ways}) == 1


def test_weights_of_two_names_with_one_content_are_added(live: Live, folders: Mapping[str, Path]) -> None:
    crimson = live.service.registry.register_folder("crimson", folders["red"]).version.name
    try:
        halves = [{"name": "red", "weight": 0.5}, {"name": "crimson", "weight": 0.5}]
        answer = live.complete(adapter=halves)
    finally:
        live.service.registry.remove("crimson")
    assert answer["choices"][0]["text"] == live.text(adapter="red")
    assert [(a["name"], a["weight"]) for a in answer["adapter"]] == [("red@1", 0.5), (crimson, 0.5)]


def test_response_names_the_content_that_served_it(live: Live) -> None:
    ids: dict[str, AdapterId] = {name: live.service.registry.version(name).content for name in ADAPTERS}
    mix = [{"name": "team/blue", "weight": 0.5}, {"name": "red", "weight": 2.0}, {"name": "green", "weight": 0.0}]
    expected = [
        {"name": "team/blue@1", "id": ids["team/blue"], "weight": 0.5},
        {"name": "red@1", "id": ids["red"], "weight": 2.0},
    ]
    response = live.http.post("/v1/completions", json=request(adapter=mix))
    assert response.json()["adapter"] == expected
    assert response.headers["x-manylora-adapter"] == f"team/blue@1={ids['team/blue']};red@1={ids['red']}"
    assert all(event["adapter"] == expected for event in live.stream(**request(adapter=mix)))
    assert "x-manylora-adapter" not in live.http.post("/v1/completions", json=request()).headers
    assert live.complete(model="red")["model"] == "red"


def test_request_ids(live: Live) -> None:
    assert live.http.get("/livez", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    own = live.http.get("/livez", headers={"x-request-id": "with space"}).headers["x-request-id"]
    assert own != "with space"
    assert len(own) == 32


def test_text_of_an_end_token_is_left_out(tmp_path: Path) -> None:
    model = tiny_model()
    codec = Codec(tiny_tokenizer(), VOCABULARY)
    (end,) = codec.encode_prompt("A")
    model.generation_config.eos_token_id = end
    with running(tiny_service(tmp_path, model)) as live:
        ended = live.complete(logit_bias={str(end): 100}, ignore_eos=False, max_tokens=3)
        ignored = live.complete(logit_bias={str(end): 100}, ignore_eos=True, max_tokens=3)
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert (ignored["choices"][0]["text"], ignored["choices"][0]["finish_reason"]) == ("AAA", "length")
