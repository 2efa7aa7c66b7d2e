"""``POST /tokenize`` and ``/detokenize``: the ids that a request runs with, their text, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from bases.base import make_base
from server.api.startup import open_service
from server.config import Settings
from tests.api.live import Live, running
from tests.tiny import tiny_model, tiny_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]


@pytest.mark.parametrize("asked", [{"messages": CHAT}, {"prompt": "Once upon a time"}])
def test_tokenize_returns_the_ids_of_a_request(live: Live, asked: dict[str, Any]) -> None:
    found = live.http.post("/tokenize", json={"model": "tiny", **asked}).json()
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    served = live.http.post(path, json={**asked, "max_tokens": 1}).json()
    assert found["count"] == len(found["tokens"]) == served["usage"]["prompt_tokens"]
    assert found["max_model_len"] == live.service.base.max_model_len
    decoded = live.service.codec.backend.decode(found["tokens"], skip_special_tokens=False)
    assert decoded.endswith("<|im_start|>assistant\n") if "messages" in asked else decoded == "Once upon a time"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "messages"),
        ({"prompt": "a", "messages": CHAT}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "a", "add_generation_prompt": False}, 400, "add_generation_prompt"),
        ({"prompt": "a", "pieces": True}, 400, "pieces"),
        ({"messages": CHAT, "add_special_tokens": True}, 400, "add_special_tokens"),
        ({"prompt": "a", "add_special_tokens": "no"}, 400, "add_special_tokens"),
        ({"prompt": "a", "return_token_strs": 1}, 400, "return_token_strs"),
        ({"prompt": "a", "model": "nobody"}, 404, "model"),
    ],
)
def test_tokenize_refusals(live: Live, body: dict[str, Any], status: int, param: str) -> None:
    answer = live.http.post("/tokenize", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_tokenize_accepts_an_adapter(live: Live) -> None:
    plain, adapted = (live.http.post("/tokenize", json={"prompt": "abc", "model": m}).json() for m in ("tiny", "red"))
    assert plain == adapted


@pytest.mark.parametrize("flags", [{}, {"return_token_strs": False}, {"return_token_strs": None}])
def test_token_strings_are_returned_on_request(live: Live, flags: dict[str, Any]) -> None:
    """As the vocabulary spells them, like vLLM."""
    asked = {"messages": CHAT, "add_special_tokens": False}
    plain = live.http.post("/tokenize", json={**asked, **flags}).json()
    found = live.http.post("/tokenize", json={**asked, "return_token_strs": True}).json()
    assert (plain["token_strs"], plain["tokens"]) == (None, found["tokens"])
    assert found["token_strs"] == tiny_tokenizer().convert_ids_to_tokens(found["tokens"])
    assert found["token_strs"][0] == "<|im_start|>"


def test_add_special_tokens_is_true_for_prompts_by_default(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    settings = Settings(
        data_dir=tmp_path, quantization="none", dtype="fp32", device="cpu", kv_memory_gib=0.01, threads=1
    )
    with running(open_service(make_base(tiny_model(), tokenizer, "tiny"), settings)) as live:
        tokens = [
            live.http.post("/tokenize", json={"prompt": "abc", **flags}).json()["tokens"]
            for flags in ({}, {"add_special_tokens": None}, {"add_special_tokens": True}, {"add_special_tokens": False})
        ]
    assert tokens[0] == tokens[1] == tokens[2] == [begin, *tokens[3]]


@pytest.mark.parametrize("asked", [{"messages": CHAT}, {"prompt": "Hé? \n"}])
def test_detokenizing_gives_the_text_with_special_tokens(live: Live, asked: dict[str, Any]) -> None:
    tokens = live.http.post("/tokenize", json=asked).json()["tokens"]
    answer = live.http.post("/detokenize", json={"model": "red", "tokens": tokens})
    text = answer.json()["prompt"]
    assert answer.json() == {"prompt": text}
    assert text.startswith("<|im_start|>system\nBe brief.") if "messages" in asked else text == asked["prompt"]


def test_detokenize_of_ids_without_text(live: Live) -> None:
    assert live.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert live.http.post("/detokenize", json={"tokens": [live.service.codec.vocabulary - 1]}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "tokens"),
        ({"tokens": "abc"}, 400, "tokens"),
        ({"tokens": [-1]}, 400, "tokens"),
        ({"tokens": [2**70]}, 400, "tokens"),
        ({"tokens": [1, 10**6]}, 400, "tokens"),
        ({"tokens": [1, True]}, 400, "tokens.1"),
        ({"tokens": [1], "text": "a"}, 400, "text"),
        ({"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
def test_detokenize_refusals(live: Live, body: dict[str, Any], status: int, param: str) -> None:
    answer = live.http.post("/detokenize", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_tokenizer_info(live: Live) -> None:
    """lm-eval's way to the server's tokenizer: the end token must be one token of ``/tokenize``."""
    info = live.http.get("/tokenizer_info").json()
    assert info["chat_template"] == live.service.base.tokenizer.chat_template
    assert info["model_max_length"] == live.service.base.max_model_len
    for name in ("bos_token", "eos_token", "pad_token"):
        assert info[name] == getattr(live.service.base.tokenizer, name)
    found = live.http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()
    assert found["tokens"] == [live.service.base.tokenizer.eos_token_id]
