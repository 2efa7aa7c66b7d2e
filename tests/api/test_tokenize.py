"""``POST /tokenize``: the ids that a request runs with, and what is refused."""

from typing import Any

import pytest

from tests.api.live import Live

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]


@pytest.mark.parametrize("asked", [{"messages": CHAT}, {"prompt": "Once upon a time"}])
def test_its_ids_are_those_of_a_request(live: Live, asked: dict[str, Any]) -> None:
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
        ({"prompt": "a", "model": "nobody"}, 404, "model"),
    ],
)
def test_what_it_refuses(live: Live, body: dict[str, Any], status: int, param: str) -> None:
    answer = live.http.post("/tokenize", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_an_adapter_is_a_model_too(live: Live) -> None:
    plain, adapted = (live.http.post("/tokenize", json={"prompt": "abc", "model": m}).json() for m in ("tiny", "red"))
    assert plain == adapted
