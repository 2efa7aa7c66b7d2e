"""Scores of continuations, against transformers and PEFT, and what is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel

from tests.api.live import Live, wait_for
from tests.tiny import CONTEXT, tiny_model, tiny_tokenizer

PROMPT = "The capital of France is"
CONTINUATIONS = [" Paris", " Rome", "!", " naïve 🙂"]


def scores(live: Live, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": PROMPT, "continuations": CONTINUATIONS, **fields}
    response = live.http.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def ids(text: str) -> list[int]:
    found: list[int] = tiny_tokenizer()(text).input_ids
    return found


def expected(model: torch.nn.Module, prompt: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """Log probabilities of the continuation by transformers, and whether each token is the most likely."""
    tokens = torch.tensor([prompt + continuation])
    with torch.no_grad():
        logprobs = model(tokens).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
    own = [logprobs[index, token].item() for index, token in enumerate(continuation)]
    return own, logprobs.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("adapter", [None, "red", "green", "team/blue"])
def test_scores_are_those_of_transformers_and_peft(
    live: Live, folders: Mapping[str, Path], adapter: str | None
) -> None:
    model: torch.nn.Module = tiny_model()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folders[adapter])
    found = scores(live, return_tokens=True, **({"adapter": adapter} if adapter else {}))
    for index, (score, continuation) in enumerate(zip(found, CONTINUATIONS, strict=True)):
        logprobs, greedy = expected(model, ids(PROMPT), ids(continuation))
        assert score["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert score["logprob"] == pytest.approx(sum(logprobs), abs=1e-3)
        assert score["mean_logprob"] == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)
        assert score["token_ids"] == ids(continuation)
        assert score["tokens"] == len(logprobs)
        assert score["is_greedy"] == greedy
        assert (score["prompt"], score["index"], score["object"]) == (0, index, "score")


def test_the_greedy_answer_is_greedy(live: Live) -> None:
    prompt = ids(PROMPT)
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    text = live.complete(**body)["choices"][0]["text"]
    if ids(text) and len(ids(text)) == 8:
        greedy, other = scores(live, prompt=prompt, continuations=[ids(text), [*ids(text)[:-1], 5]])
        assert greedy["is_greedy"]
        assert not other["is_greedy"]


def test_several_prompts_have_a_list_each(live: Live) -> None:
    found = scores(live, prompt=[PROMPT, ids("One")], continuations=[[" Paris", "!"], [ids(" two")]])
    assert [(each["prompt"], each["index"]) for each in found] == [(0, 0), (0, 1), (1, 0)]
    assert found[:2] == scores(live, continuations=[" Paris", "!"])
    assert found[2]["logprob"] == scores(live, prompt="One", continuations=[" two"])[0]["logprob"]
    one = scores(live, prompt=[PROMPT], continuations=[[" Paris"]])
    assert one == scores(live, continuations=[" Paris"]) == scores(live, continuations=[ids(" Paris")])


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_continuation(live: Live) -> None:
    assert scores(live, prompt=f"{PROMPT} ", continuations=["Paris"]) == scores(live, continuations=[" Paris"])


@pytest.mark.parametrize("adapter", ["tiny", "red"])
def test_what_lm_eval_reads_from_completions_is_the_same(live: Live, adapter: str) -> None:
    """Version 0.4.13's ``local-completions`` sends this, and sums up like this."""
    pairs = [(ids(PROMPT), ids(continuation)) for continuation in CONTINUATIONS]
    asked = {"model": adapter, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    response = live.http.post("/v1/completions", json={**asked, "prompt": [before + after for before, after in pairs]})
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    for choice, (before, _), score in zip(choices, pairs, scores(live, model=adapter), strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][len(before) : -1]
        top = [max(each.values()) for each in choice["logprobs"]["top_logprobs"][len(before) : -1]]
        assert sum(logprobs) == pytest.approx(score["logprob"], abs=1e-3)
        assert (logprobs == top) == score["is_greedy"]


def test_usage(live: Live) -> None:
    answer = live.http.post("/v1/score", json={"prompt": "One", "continuations": ["ab", "c"], "adapter": "red"}).json()
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert answer["adapter"][0]["name"] == "red@1"
    assert answer["object"] == "list"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": ["a"] * 257}, "prompt", "at most 256"),
        ({"continuations": None}, "continuations", "required"),
        ({"continuations": []}, "continuations", "must be a list"),
        ({"continuations": " Paris"}, "continuations", "must be a list"),
        ({"continuations": [""]}, "continuations", "no tokens of its own"),
        ({"continuations": [[]]}, "continuations", "at least one"),
        ({"continuations": ["a", 5]}, "continuations", "must be a string or a list of token ids"),
        ({"continuations": [["a"], ["b"]]}, "continuations", "1 prompts and 2 lists"),
        ({"continuations": ["a"] * 1025}, "continuations", "at most 1024"),
        ({"continuations": [[264]]}, "continuations", "Token ids are 0 to 263"),
        ({"continuations": ["A" * CONTEXT]}, "continuations", "maximum context length"),
        ({"continuations": [PROMPT, [5], ""]}, "continuations", "no tokens"),
        ({"prompt": [5], "continuations": [""]}, "continuations", "no tokens"),
        ({"text_1": "a"}, "text_1", "Unknown field"),
    ],
    ids=str,
)
def test_what_is_refused(live: Live, fields: dict[str, Any], param: str, words: str) -> None:
    response = live.http.post("/v1/score", json={"prompt": PROMPT, "continuations": CONTINUATIONS, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_unknown_names_are_404(live: Live) -> None:
    for field in ("adapter", "model"):
        response = live.http.post("/v1/score", json={"prompt": "a", "continuations": ["b"], field: "nobody"})
        assert response.status_code == 404
        assert response.json()["error"]["param"] == field


def test_a_client_that_leaves_frees_everything(live: Live) -> None:
    body = {"prompt": "A" * 200, "continuations": [f"{index}" for index in range(800)], "adapter": "red"}
    with pytest.raises(httpx.ReadTimeout):
        live.http.post("/v1/score", json=body, timeout=0.3)
    wait_for(live.idle)
