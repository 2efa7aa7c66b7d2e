"""Embeddings, scores, responses and Anthropic's messages with the demo model, where the text matters."""

from typing import Any

import numpy as np
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.api.live import Live

pytestmark = pytest.mark.demo

QUESTION = "What is the capital of France?"
MODELS = ("base", "red")


def name(demo: Live, model: str) -> str:
    return demo.service.base.name if model == "base" else model


@pytest.mark.parametrize("model", MODELS)
def test_both_clients_learn_the_capital_of_france(demo: Live, model: str) -> None:
    """In the first sentence: how long the model goes on depends on the processor's rounding."""
    ask: dict[str, Any] = {"model": name(demo, model), "extra_body": {"temperature": 0, "stop": ["."]}}
    with OpenAI(base_url=f"{demo.http.base_url}/v1", api_key="none") as openai:
        response = openai.responses.create(input=QUESTION, max_output_tokens=200, **ask)
        with openai.responses.stream(input=QUESTION, max_output_tokens=200, **ask) as stream:
            assert stream.get_final_response().output_text == response.output_text
    with Anthropic(base_url=str(demo.http.base_url), api_key="none") as anthropic:
        messages: Any = [{"role": "user", "content": QUESTION}]
        message = anthropic.messages.create(messages=messages, max_tokens=200, **ask)
    assert "Paris" in response.output_text
    assert response.status == "completed"
    assert message.content[0].type == "text"
    assert message.content[0].text == response.output_text
    assert message.stop_reason == "stop_sequence"


@pytest.mark.parametrize("model", MODELS)
def test_paris_is_more_likely_than_rome(demo: Live, model: str) -> None:
    body = {"model": name(demo, model), "prompt": "The capital of France is", "continuations": [" Paris", " Rome"]}
    paris, rome = demo.http.post("/v1/score", json=body).json()["data"]
    assert paris["logprob"] > rome["logprob"]
    assert paris["is_greedy"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("model", MODELS)
def test_similar_texts_are_nearer(demo: Live, model: str, pooling: str) -> None:
    texts = [
        "The cat sits on the mat.",
        "A cat is sitting on a mat.",
        "Interest rates rose by a quarter of a percent last month.",
    ]
    with OpenAI(base_url=f"{demo.http.base_url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model=name(demo, model), input=texts, extra_body={"pooling": pooling})
    vectors = np.array([each.embedding for each in answer.data])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
