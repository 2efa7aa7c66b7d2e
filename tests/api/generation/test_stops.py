"""Where an answer ends: stop strings across tokens, stop tokens, least and most tokens."""

from typing import Any

import pytest

from tests.api.live import Live, request


def ids_of(live: Live, text: str) -> list[int]:
    return live.service.codec.encode_prompt(text)


def whole(live: Live, stream: bool, **fields: Any) -> dict[str, Any]:
    """Return the only choice; of a stream, its joined text and its last chunk's fields."""
    if not stream:
        choice: dict[str, Any] = live.complete(**fields)["choices"][0]
        return choice
    choices = [event["choices"][0] for event in live.stream(**request(**fields))]
    return {**choices[-1], "text": "".join(choice["text"] for choice in choices)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_is_never_shown_in_part(live: Live, stream: bool) -> None:
    text = live.text(max_tokens=60)
    for start in (10, 17, 25):
        stop = text[start : start + 7]  # seven tokens or more: each is a byte
        choice = whole(live, stream, max_tokens=60, stop=[stop, "no such thing"])
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
        assert choice["stop_reason"] == stop


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_string_can_be_included(live: Live, stream: bool) -> None:
    text = live.text(max_tokens=60)
    stop = text[20:24]
    choice = whole(live, stream, max_tokens=60, stop=stop, include_stop_str_in_output=True)
    assert choice["text"] == text[: text.index(stop) + 4]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_tokens(live: Live, stream: bool) -> None:
    (a,) = ids_of(live, "A")
    bias = {"logit_bias": {str(a): 100}}
    choice = whole(live, stream, **bias, stop_token_ids=[a], max_tokens=5)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", a)
    choice = whole(live, stream, **bias, stop_token_ids=[a], include_stop_str_in_output=True, max_tokens=5)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("A", "stop", a)
    choice = whole(live, stream, **bias, stop_token_ids=[], max_tokens=5)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("AAAAA", "length", None)


def test_the_models_own_end_token_has_no_stop_reason(live: Live) -> None:
    (end,) = live.service.base.eos_token_ids
    choice = whole(live, False, logit_bias={str(end): 100}, ignore_eos=False)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    choice = whole(live, False, logit_bias={str(end): 100}, ignore_eos=True, stop_token_ids=[end])
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", end)


def test_no_end_before_min_tokens(live: Live) -> None:
    (end,) = live.service.base.eos_token_ids
    (a,) = ids_of(live, "A")
    body = {"logit_bias": {str(end): 100, str(a): 50}, "ignore_eos": False, "max_tokens": 12}
    answer = live.complete(**body, min_tokens=7)
    assert answer["choices"][0]["text"] == "AAAAAAA"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_no_stop_string_before_min_tokens(live: Live) -> None:
    (a,) = ids_of(live, "A")
    choice = whole(live, False, logit_bias={str(a): 100}, stop="A", min_tokens=5)
    assert (choice["text"], choice["finish_reason"]) == ("AAAAA", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_can_be_kept(live: Live, stream: bool) -> None:
    (end,) = live.service.base.eos_token_ids
    fields = {"logit_bias": {str(end): 100}, "max_tokens": 2}
    assert whole(live, stream, **fields, skip_special_tokens=False)["text"] == "<|im_end|><|im_end|>"
    assert whole(live, stream, **fields, skip_special_tokens=True)["text"] == ""
    assert whole(live, stream, **fields, skip_special_tokens=False, ignore_eos=False)["text"] == ""


def test_no_limit(live: Live) -> None:
    answer = live.complete(max_tokens=-1)
    assert answer["usage"]["total_tokens"] == live.service.base.max_model_len
    chat = {"messages": [{"role": "user", "content": "Why?"}], "ignore_eos": True}
    for field in ("max_tokens", "max_completion_tokens"):
        response = live.http.post("/v1/chat/completions", json={**chat, field: -1})
        assert response.json()["usage"]["total_tokens"] == live.service.base.max_model_len


def test_values_for_nothing(live: Live) -> None:
    nothing: dict[str, Any] = {
        "stop": "",
        "stop_token_ids": [],
        "min_tokens": 0,
        "best_of": 0,
        "logprobs": False,
        "echo": False,
        "include_stop_str_in_output": False,
        "prompt_logprobs": None,
        "logit_bias": {},
        "metadata": {},
        "user": "",
    }
    assert live.text(**nothing) == live.text()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 13}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [264]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
def test_bad_values(live: Live, fields: dict[str, Any], param: str) -> None:
    for path, more in (
        ("/v1/completions", {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Why?"}]}),
    ):
        body = {"max_tokens": 12, **more, **fields} | ({} if more else {"prompt": "Once"})
        response = live.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
