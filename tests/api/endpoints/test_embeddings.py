"""Embeddings: against transformers and PEFT, through OpenAI's client, and what is refused."""

import base64
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from openai import OpenAI
from peft import PeftModel

from bases.errors import ConfigError
from server.api.generation.vectors import unit_vector
from server.api.startup import choose_pooling
from server.config import Settings
from server.errors import EngineError
from tests.api.live import Live, wait_for
from tests.tiny import CONTEXT, tiny_model, tiny_tokenizer

TEXTS = ["A contract is", "Ein Vertrag ist ein Versprechen.", "naïve 🙂", "A"]
HIDDEN = 64


@pytest.fixture
def sdk(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def embed(live: Live, inputs: Any = TEXTS, **fields: Any) -> NDArray[np.float32]:
    response = live.http.post("/v1/embeddings", json={"input": inputs, **fields})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return np.array([each["embedding"] for each in data], np.float32)


def hidden_states(model: torch.nn.Module, text: str) -> torch.Tensor:
    """Final hidden states [tokens, hidden] by transformers."""
    ids = tiny_tokenizer()(text, return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = model(ids, output_hidden_states=True).hidden_states[-1][0]
    return found


def expected(model: torch.nn.Module, pooling: str) -> NDArray[np.float32]:
    states = [hidden_states(model, text) for text in TEXTS]
    pooled = torch.stack([each[-1] if pooling == "last" else each.mean(0) for each in states])
    vectors: NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    return vectors


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("adapter", [None, "red", "green", "team/blue"])
def test_vectors_are_those_of_transformers_and_peft(
    live: Live, folders: Mapping[str, Path], adapter: str | None, pooling: str
) -> None:
    model: torch.nn.Module = tiny_model()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folders[adapter])
    vectors = embed(live, pooling=pooling, **({"adapter": adapter} if adapter else {}))
    np.testing.assert_allclose(vectors, expected(model, pooling), atol=2e-5)


def test_adapters_and_the_base_differ(live: Live) -> None:
    base, red, mix = (
        embed(live, adapter=adapter)
        for adapter in ([], "red", [{"name": "red", "weight": 0.5}, {"name": "green", "weight": 0.5}])
    )
    assert (base * red).sum(-1).max() < 0.99
    assert (mix * red).sum(-1).max() < 0.999


def test_a_model_may_be_an_adapter_or_a_version(live: Live) -> None:
    by_field = embed(live, adapter="red")
    for model in ("red", "red@1"):
        np.testing.assert_allclose(embed(live, model=model), by_field, atol=1e-6)
    response = live.http.post("/v1/embeddings", json={"input": "A", "model": "red"})
    assert response.json()["adapter"][0]["name"] == "red@1"
    assert response.headers["x-manylora-adapter"].startswith("red@1=")
    assert response.json()["model"] == "red"


def test_last_is_the_default(live: Live) -> None:
    np.testing.assert_allclose(embed(live), embed(live, pooling="last"), atol=1e-6)
    assert live.http.post("/v1/embeddings", json={"input": "A"}).json()["pooling"] == "last"


def test_inputs_alone_in_a_list_and_as_tokens_are_equal(live: Live) -> None:
    vectors = embed(live)
    ids = [tiny_tokenizer()(text).input_ids for text in TEXTS]
    np.testing.assert_allclose(embed(live, ids), vectors, atol=1e-6)
    for text, tokens, vector in zip(TEXTS, ids, vectors, strict=True):
        np.testing.assert_allclose(embed(live, text)[0], vector, atol=1e-6)
        np.testing.assert_allclose(embed(live, tokens)[0], vector, atol=1e-6)


def test_usage_and_shape(live: Live) -> None:
    answer = live.http.post("/v1/embeddings", json={"input": TEXTS}).json()
    count = sum(len(text.encode()) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    assert answer["adapter"] == []
    assert {each["object"] for each in answer["data"]} == {"embedding"}
    np.testing.assert_allclose(np.linalg.norm(embed(live), axis=-1), 1, atol=1e-6)


def test_base64_is_little_endian_float32(live: Live) -> None:
    body = {"input": TEXTS, "encoding_format": "base64"}
    data = live.http.post("/v1/embeddings", json=body).json()["data"]
    vectors = np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in data])
    np.testing.assert_allclose(vectors, embed(live), atol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 5, HIDDEN])
def test_dimensions_are_the_first_ones_normalised_again(live: Live, dimensions: int) -> None:
    kept = embed(live)[:, :dimensions]
    np.testing.assert_allclose(
        embed(live, dimensions=dimensions), kept / np.linalg.norm(kept, axis=-1, keepdims=True), atol=1e-6
    )


def test_the_sdk(sdk: OpenAI, live: Live) -> None:
    """By default it asks for base64 and decodes that."""
    for fields in ({}, {"encoding_format": "float"}, {"dimensions": 7, "user": "somebody"}):
        answer = sdk.embeddings.create(model="tiny", input=TEXTS, **fields)  # type: ignore[arg-type]
        wanted = embed(live, **({"dimensions": 7} if "dimensions" in fields else {}))
        np.testing.assert_allclose(np.array([each.embedding for each in answer.data]), wanted, atol=1e-7)
        assert answer.usage.prompt_tokens == sum(len(text.encode()) for text in TEXTS)
    assert sdk.embeddings.create(model="green", input="A").model == "green"


def test_among_chats_in_one_batch_each_is_as_alone(live: Live) -> None:
    alone, text = embed(live, adapter="red"), live.text(max_tokens=60)
    with ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(live.text, max_tokens=60) for _ in range(4)]
        vectors = [pool.submit(embed, live, adapter="red") for _ in range(4)]
        assert all(each.result() == text for each in texts)
        for each in vectors:
            np.testing.assert_allclose(each.result(), alone, atol=1e-5)


def test_a_thousand_inputs(live: Live) -> None:
    inputs = [f"{index % 7}" for index in range(1000)]
    vectors = embed(live, inputs)
    assert len(vectors) == 1000
    np.testing.assert_allclose(vectors[7:14], vectors[:7], atol=1e-5)


def refused(live: Live, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    response = live.http.post("/v1/embeddings", json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "required"),
        ({"input": []}, "input", "no tokens"),
        ({"input": ""}, "input", "no tokens"),
        ({"input": ["A", ""]}, "input", "no tokens"),
        ({"input": [[]]}, "input", "no tokens"),
        ({"input": 5}, "input", "must be a string or a list of token ids"),
        ({"input": ["A", 5]}, "input", "must be a string or a list of token ids"),
        ({"input": [1, "A"]}, "input", "must be a string or a list of token ids"),
        ({"input": [True]}, "input", "must be a string or a list of token ids"),
        ({"input": [-1]}, "input", "Token ids are 0 to 263"),
        ({"input": [[5], [264]]}, "input", "Token ids are 0 to 263"),
        ({"input": ["A"] * 2049}, "input", "at most 2048"),
        ({"input": "A" * (CONTEXT + 1)}, "input", "maximum context length"),
        ({"input": "A", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "A", "dimensions": HIDDEN + 1}, "dimensions", f"have {HIDDEN} dimensions"),
        ({"input": "A", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "A", "pooling": "cls"}, "pooling", "last"),
        ({"input": "A", "normalize": False}, "normalize", "not supported"),
        ({"input": "A", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"input": "A", "temperature": 1}, "temperature", "Unknown field"),
    ],
    ids=str,
)
def test_what_is_refused(live: Live, fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(live, fields)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_whole_context_fits(live: Live) -> None:
    assert embed(live, "A" * CONTEXT).shape == (1, HIDDEN)
    assert refused(live, {"input": "A" * (CONTEXT + 1)})["code"] == "context_length_exceeded"


def test_unknown_names_are_404(live: Live) -> None:
    assert refused(live, {"input": "A", "adapter": "nobody"}, 404)["param"] == "adapter"
    assert refused(live, {"input": "A", "model": "nobody"}, 404)["param"] == "model"


def test_a_client_that_leaves_frees_everything(live: Live) -> None:
    inputs = [chr(65 + index % 26) * (CONTEXT - index % 30) for index in range(700)]
    with pytest.raises(httpx.ReadTimeout):
        live.http.post("/v1/embeddings", json={"input": inputs, "adapter": "red"}, timeout=0.3)
    wait_for(live.idle)
    assert live.service.engine.stats().running == 0


def test_the_server_pools_as_its_option_or_the_models_files_say(live: Live) -> None:
    base = live.service.base
    assert choose_pooling(base, Settings()) == "last"
    assert choose_pooling(base, Settings(pooling="mean")) == "mean"
    assert choose_pooling(replace(base, pooling_modes=("mean",)), Settings()) == "mean"
    assert choose_pooling(replace(base, pooling_modes=("lasttoken",)), Settings()) == "last"
    cls = replace(base, pooling_modes=("cls", "mean"))
    assert choose_pooling(cls, Settings(pooling="last")) == "last"
    with pytest.raises(ConfigError, match="cls and mean pooling, which is not served"):
        choose_pooling(cls, Settings())


def test_no_direction_is_an_error() -> None:
    for values in ([0.0, 0.0], [1.0, np.inf], [np.nan, 1.0]):
        with pytest.raises(EngineError):
            unit_vector(np.array(values, np.float32).tobytes())
