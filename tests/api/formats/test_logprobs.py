"""Log probabilities of answers and prompts, in each endpoint's shape."""

import math
from typing import Any

import pytest
import torch

from tests.api.live import Live, request
from tests.tiny import tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Why? 🙂"}]
PROMPTS = ["Once upon a time", "🙂 日本語 é", "x"]


def reference(tokens: list[int]) -> torch.Tensor:
    """Return transformers' log probabilities [len(tokens), vocabulary] of what follows each token."""
    with torch.inference_mode():
        return torch.log_softmax(tiny_model()(torch.tensor([tokens])).logits[0], dim=-1)


def chat(live: Live, **fields: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "max_tokens": 20, "temperature": 0, "ignore_eos": True, **fields}
    response = live.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def as_bytes(entries: list[dict[str, Any]]) -> bytes:
    return bytes(byte for entry in entries for byte in entry["bytes"])


def test_a_chats_tokens_are_its_content(live: Live) -> None:
    for seed in range(10):
        answer = chat(live, logprobs=True, top_logprobs=4, temperature=1.5, seed=seed, max_tokens=40)
        choice = answer["choices"][0]
        content = choice["logprobs"]["content"]
        assert as_bytes(content).decode(errors="replace") == choice["message"]["content"]
        assert len(content) == answer["usage"]["completion_tokens"] == 40
        for entry in content:
            top = [other["logprob"] for other in entry["top_logprobs"]]
            assert len(top) == 4
            assert top == sorted(top, reverse=True)
            assert -9999 <= entry["logprob"] <= top[0] <= 0


def test_log_probabilities_are_those_of_transformers(live: Live) -> None:
    answer = chat(live, logprobs=True, top_logprobs=3, return_token_ids=True)
    prompt, tokens = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    expected = reference([*prompt, *tokens])[len(prompt) - 1 : -1]
    for entry, token, row in zip(answer["choices"][0]["logprobs"]["content"], tokens, expected, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(float(row.max()), abs=1e-3)
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}, "greedy"


def test_log_probabilities_do_not_depend_on_sampling(live: Live) -> None:
    plain = live.complete(logprobs=2)["choices"][0]["logprobs"]
    assert live.complete(logprobs=2, temperature=1e-6, top_k=1)["choices"][0]["logprobs"] == plain
    assert live.complete(logprobs=0)["choices"][0]["logprobs"]["token_logprobs"] == plain["token_logprobs"]


def test_without_top_logprobs_there_are_none(live: Live) -> None:
    for fields in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0}):
        content = chat(live, **fields)["choices"][0]["logprobs"]["content"]
        assert all(entry["top_logprobs"] == [] for entry in content)
    for fields in ({}, {"logprobs": False}, {"logprobs": False, "top_logprobs": 0}, {"logprobs": None}):
        assert chat(live, **fields)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_shape_of_completions(live: Live, prompt: str) -> None:
    choice = live.complete(prompt=prompt, logprobs=2, max_tokens=30)["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {30}
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"].startswith(token, offset)
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_echo(live: Live, max_tokens: int) -> None:
    for prompt in PROMPTS:
        tokens = live.service.codec.encode_prompt(prompt)
        alone = live.complete(prompt=prompt, max_tokens=max(max_tokens, 1), logprobs=1)["choices"][0]
        answer = live.complete(prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=1)
        choice = answer["choices"][0]
        assert choice["text"] == prompt + (alone["text"] if max_tokens else "")
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(tokens) + max_tokens
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        expected = reference(tokens)
        for token, logprob, row in zip(tokens[1:], found["token_logprobs"][1:], expected, strict=False):
            assert logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert found["text_offset"][: len(tokens)][-1] <= len(prompt)
        if max_tokens:
            assert found["tokens"][len(tokens) :] == alone["logprobs"]["tokens"]
            expected_rest = pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-4)  # another shape of the step
            assert found["token_logprobs"][len(tokens) :] == expected_rest
            assert found["text_offset"][len(tokens)] == len(prompt)


def test_echo_of_tokens_and_without_logprobs(live: Live) -> None:
    tokens = live.service.codec.encode_prompt("Once")
    choice = live.complete(prompt=tokens, echo=True)["choices"][0]
    assert choice["text"] == "Once" + live.text(prompt="Once")
    assert choice["logprobs"] is None
    many = live.complete(prompt=["Once", "Twice"], echo=True, max_tokens=0)
    assert [choice["text"] for choice in many["choices"]] == ["Once", "Twice"]
    assert many["usage"]["completion_tokens"] == 0


def test_offsets_count_the_special_tokens_that_the_text_shows(live: Live) -> None:
    shown = [257, *live.service.codec.encode_prompt("ab"), 258, *live.service.codec.encode_prompt("c")]
    for fields in ({"echo": True}, {"echo": True, "skip_special_tokens": False}, {"skip_special_tokens": False}):
        for prompt in (shown, "<|im_start|>ab<|im_end|>c"):
            bias = {"257": 100}  # the answer consists of special tokens
            choice = live.complete(prompt=prompt, logprobs=0, max_tokens=3, logit_bias=bias, **fields)["choices"][0]
            found = choice["logprobs"]
            kept = len(found["tokens"]) - (3 if fields.get("skip_special_tokens", True) else 0)
            for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[:kept]:
                assert choice["text"].startswith(token, offset), (fields, token, offset)
            assert found["text_offset"][kept:] == [len(choice["text"])] * (len(found["tokens"]) - kept)


def test_prompt_logprobs(live: Live) -> None:
    for fields in ({}, {"echo": True, "logprobs": 5}, {"n": 2}):
        choice = live.complete(prompt_logprobs=2, **fields)["choices"][0]
        tokens = live.service.codec.encode_prompt("Once upon a time")
        found = choice["prompt_logprobs"]
        assert found[0] is None
        for token, its, row in zip(tokens[1:], found[1:], reference(tokens), strict=False):
            assert 2 <= len(its) <= 3
            assert its[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
            assert its[str(token)]["decoded_token"] == live.service.codec.token_texts.text(token)
            best = its[str(int(row.argmax()))]
            assert best["rank"] == 1
    answer = chat(live, prompt_logprobs=0, return_token_ids=True)
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    assert chat(live, prompt_logprobs=0, max_tokens=0)["choices"][0]["message"]["content"] == ""


def test_the_prefix_cache_hides_no_prompt_logprobs(live: Live) -> None:
    prompt = "What is in the prefix cache when it is sent again, log probabilities included?"
    answers = [live.complete(prompt=prompt, prompt_logprobs=1, max_tokens=0) for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    live.complete(prompt=prompt)
    assert live.complete(prompt=prompt, prompt_logprobs=1, max_tokens=0)["choices"] == answers[0]["choices"]


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"n": 2, "echo": True}], ids=str)
def test_a_streams_logprobs_are_those_of_the_whole_answer(live: Live, fields: dict[str, Any]) -> None:
    body = request(logprobs=2, return_token_ids=True, temperature=1.5, seed=3, max_tokens=25, stop="e", **fields)
    whole = live.complete(**body)
    choices = [choice for event in live.stream(**body) for choice in event["choices"]]
    for expected in whole["choices"]:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        for name, values in expected["logprobs"].items():
            parts = [choice["logprobs"][name] for choice in mine if choice["logprobs"]]
            assert [value for part in parts for value in part] == values, name
        assert [token for choice in mine for token in choice.get("token_ids", ())] == expected["token_ids"]
        assert mine[0]["prompt_token_ids"] == expected["prompt_token_ids"]


def test_a_chat_streams_logprobs_are_those_of_the_whole_answer(live: Live) -> None:
    body = {"messages": QUESTION, "max_tokens": 25, "seed": 3, "logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    whole = chat(live, **body, return_token_ids=True, temperature=1.5)
    events = live.stream(CHAT, **body, return_token_ids=True, temperature=1.5)
    choices = [event["choices"][0] for event in events]
    parts = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    assert [entry for part in parts for entry in part] == whole["choices"][0]["logprobs"]["content"]
    assert [token for c in choices for token in c.get("token_ids", ())] == whole["choices"][0]["token_ids"]
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert choices[-1]["delta"] == {}


def test_tokens_of_a_stop_string_have_no_logprobs(live: Live) -> None:
    text = chat(live, max_tokens=60)["choices"][0]["message"]["content"]
    choice = chat(live, max_tokens=60, stop=text[20:24], logprobs=True, return_token_ids=True)["choices"][0]
    content = choice["logprobs"]["content"]
    assert as_bytes(content).decode(errors="replace") == choice["message"]["content"] == text[: text.index(text[20:24])]
    assert len(choice["token_ids"]) > len(content), "but ids are those of all tokens"


def test_the_end_token_has_logprobs_in_completions_only(live: Live) -> None:
    (end,) = live.service.base.eos_token_ids
    ends = {"logit_bias": {str(end): 100}, "ignore_eos": False}
    choice = live.complete(**ends, logprobs=0)["choices"][0]
    assert choice["logprobs"]["tokens"] == ["<|im_end|>"], "lm-eval counts on the last token"
    assert chat(live, **ends, logprobs=True)["choices"][0]["logprobs"]["content"] == []


def test_an_adapters_log_probabilities_are_its_own(live: Live) -> None:
    rows = {}
    for adapter in (None, "red", "green"):
        choice = live.complete(adapter=adapter, echo=True, logprobs=0, max_tokens=0)["choices"][0]
        rows[adapter] = tuple(choice["logprobs"]["token_logprobs"])
    assert len(set(rows.values())) == 3
    assert all(math.isfinite(value) for row in rows.values() for value in row[1:])


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_bad_values(live: Live, path: str, fields: dict[str, Any], param: str) -> None:
    body = {"messages": QUESTION} if path == CHAT else {"prompt": "Once"}
    response = live.http.post(path, json={**body, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_scoring_as_lm_eval_does_it(live: Live) -> None:
    """A batch of prompts as token ids, one of which ends with the context: echo, logprobs and one token."""
    codec = live.service.codec
    prompts = [codec.encode_prompt(text) for text in ("One. Two.", "🙂 three", "x" * 255)]
    answer = live.complete(prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234, ignore_eos=False)
    for tokens, choice in zip(prompts, answer["choices"], strict=True):
        scored = choice["logprobs"]["token_logprobs"][1:-1]  # lm-eval drops the answer's token
        rows = reference(tokens)
        assert scored == pytest.approx([float(rows[n, token]) for n, token in enumerate(tokens[1:])], abs=1e-3)
    whole = live.complete(prompt="x" * 256, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert len(whole["logprobs"]["tokens"]) == 256
