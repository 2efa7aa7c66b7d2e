"""Training token ids equal a server's for the same messages, with the demo's tokenizer."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from bases.base import make_base
from server.api.startup import open_service
from server.config import Settings
from tests.api.live import Live, running
from tests.training.demo_base import demo_tokenizer
from training.data.formats import recognise, to_conversation
from training.data.rendering import Renderer

CONVERSATIONS = [
    [("user", "What is the capital of France?"), ("assistant", "Paris.")],
    [("system", "Answer in JSON."), ("user", "Grüße aus 京都 🙂!\n\n1234  5"), ("assistant", '{"a": 1}')],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "  <|im_end| > as text\t"), ("assistant", "So.")],
    [("developer", "Be brief."), ("user", "Ω" * 300), ("assistant", "Yes")],
    [("user", "Indent it."), ("assistant", "\n\n    pass"), ("user", "Again."), ("assistant", "    done")],
]
PLAIN = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
PARTS = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
SHAPES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "content parts": ({"messages": [{**PLAIN[0], "content": PARTS}, PLAIN[1]]}, [{**PLAIN[0], "content": PARTS}]),
    "a name": ({"messages": [{**PLAIN[0], "name": "ann"}, PLAIN[1]]}, [{**PLAIN[0], "name": "ann"}]),
    "nulls, as clients and Arrow have them": (
        {"messages": [{**turn, "name": None, "tool_calls": None, "weight": None} for turn in PLAIN], "tools": None},
        [{**PLAIN[0], "name": None, "tool_calls": None}],
    ),
    "ShareGPT": (
        {"system": "Count.", "conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "2"}]},
        [{"role": "system", "content": "Count."}, PLAIN[0]],
    ),
    "Alpaca": ({"instruction": "How many?", "input": "", "output": "Two."}, [PLAIN[0]]),
}
"""Format -> a row, and the equivalent messages of a client."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A small random model with the demo's tokenizer: the weights do not matter here."""
    tokenizer = demo_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    small = {"quantization": "none", "dtype": "fp32", "device": "cpu", "kv_memory_gib": 0.01, "threads": 1}
    settings = Settings(data_dir=tmp_path_factory.mktemp("ids"), **small)
    with running(open_service(make_base(LlamaForCausalLM(config), tokenizer, "demo"), settings)) as live:
        yield live


@pytest.mark.demo
@pytest.mark.parametrize("turns", CONVERSATIONS, ids=[str(len(turns)) + turns[0][0] for turns in CONVERSATIONS])
def test_training_ids_are_serving_ids(live: Live, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    trained = Renderer(demo_tokenizer()).render(to_conversation({"messages": messages}, "chat", "rows.jsonl:1"))
    asked = {"model": "demo", "messages": messages[:-1]}
    tokens = live.http.post("/tokenize", json=asked).json()["tokens"]
    assert trained.prompt == tokens
    answer = live.http.post("/v1/chat/completions", json={**asked, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens) > 5


@pytest.mark.demo
def test_the_text_of_special_tokens_is_tokens_in_training_and_in_serving_on_request(live: Live) -> None:
    turns = [{"role": "user", "content": "  <|im_end|> as text\t"}, {"role": "assistant", "content": "So."}]
    trained = Renderer(demo_tokenizer()).render(to_conversation({"messages": turns}, "chat", "rows.jsonl:1"))
    asked = {"model": "demo", "messages": turns[:-1]}
    on_request = live.http.post("/tokenize", json={**asked, "special_tokens_in_content": True}).json()["tokens"]
    assert trained.prompt == on_request
    assert live.http.post("/tokenize", json=asked).json()["tokens"] != on_request


@pytest.mark.demo
@pytest.mark.parametrize("shape", SHAPES)
def test_other_row_formats_have_equal_serving_ids(live: Live, shape: str) -> None:
    row, messages = SHAPES[shape]
    trained = Renderer(demo_tokenizer()).render(to_conversation(row, recognise(row, ""), "rows.jsonl:1"))
    tokens = live.http.post("/tokenize", json={"model": "demo", "messages": messages}).json()["tokens"]
    assert trained.prompt == tokens


@pytest.mark.demo
@pytest.mark.parametrize("prompt", ["2+2=", "def f():\n", "  <|im_end|>"])
def test_prompt_of_a_completion_equals_the_servers(live: Live, prompt: str) -> None:
    row = {"prompt": prompt, "completion": "\n    4"}
    trained = Renderer(demo_tokenizer()).render(to_conversation(row, "completion", "rows.jsonl:1"))
    tokens = live.http.post("/tokenize", json={"model": "demo", "prompt": prompt}).json()["tokens"]
    assert trained.prompt == tokens
