"""Filling in the middle, with a model whose tokenizer has tokens for it."""

from collections.abc import Iterator

import pytest

from bases.base import make_base
from server.api.startup import open_service
from server.config import Settings
from tests.api.live import Live, request, running
from tests.tiny import tiny_model, tiny_tokenizer

TOKENS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


@pytest.fixture(scope="module")
def infilling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of a tiny model with StarCoder's tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    root = tmp_path_factory.mktemp("infilling")
    settings = Settings(
        data_dir=root / "data", quantization="none", dtype="fp32", device="cpu", kv_memory_gib=0.01, threads=1
    )
    with running(open_service(make_base(tiny_model(), tokenizer, "tiny"), settings)) as live:
        yield live


def test_the_prompt_of_a_suffix(infilling: Live) -> None:
    codec = infilling.service.codec
    before, after, middle = (codec.backend.token_to_id(text) for text in TOKENS)
    wanted = [before, *codec.encode_prompt("def f("), after, *codec.encode_prompt("):"), middle]
    [choice] = infilling.complete(prompt="def f(", suffix="):", return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == wanted
    assert choice["text"] == infilling.text(prompt=wanted)
    [choice] = infilling.complete(prompt="", suffix="x", return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == [before, after, *codec.encode_prompt("x"), middle]


@pytest.mark.parametrize("token", TOKENS)
def test_an_answer_ends_at_the_next_part(infilling: Live, token: str) -> None:
    id_ = infilling.service.codec.backend.token_to_id(token)
    fields = {"logit_bias": {str(id_): 100}, "ignore_eos": False}
    [choice] = infilling.complete(prompt="def f(", suffix="):", **fields)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    [choice] = infilling.complete(prompt="def f(", **fields)["choices"]
    assert choice["finish_reason"] == "length"


def test_an_empty_suffix_is_none(infilling: Live) -> None:
    assert infilling.complete(suffix="")["choices"] == infilling.complete()["choices"]
    body = request(prompt="a", suffix="b", stream=True)
    assert infilling.http.post("/v1/completions", json=body).status_code == 200
