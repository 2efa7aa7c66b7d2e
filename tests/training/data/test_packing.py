"""Packed rows give each example the loss that it has alone."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import PreTrainedModel

from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from tests.training.demo_base import demo_model, demo_tokenizer
from tests.training.rows import chat
from training.data.conversation import Conversation
from training.data.packing import check_no_leak, collate, pack
from training.data.rendering import UNTRAINED, Example, Renderer

SAID = (
    ("Hi", "Hello"),
    ("What is it?", "It is a very long answer, of many words.", "And then?", "Nothing."),
    ("Count", "1 2 3 4 5 6 7 8 9"),
    ("A", "B"),
    ("Say it again", "No"),
)


def examples(renderer: Renderer) -> list[Example]:
    return [*(renderer.render(chat(*turns)) for turns in SAID), renderer.render(Conversation("a:1", text="Once more."))]


def of_length(length: int, place: int) -> Example:
    return Example([place % 50] * length, [UNTRAINED] + [place % 50] * (length - 1), f"a:{place}", 0, "")


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(0, 3))
def test_every_example_is_in_one_row_that_holds_it(lengths: list[int], seed: int) -> None:
    given_ = [of_length(length, place) for place, length in enumerate(lengths)]
    rows = pack(given_, 20, seed)
    assert Counter(example.source for row in rows for example in row.examples) == Counter(e.source for e in given_)
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == len(row.position_ids) <= 20
        assert row.input_ids == [token for example in row.examples for token in example.input_ids]
        assert row.position_ids == [place for example in row.examples for place in range(len(example.input_ids))]
    half_full = [row for row in rows if len(row.input_ids) <= 10]
    assert len(half_full) <= 1, "two rows that would fit one"


def test_packing_fills_rows_exactly() -> None:
    rows = pack([of_length(length, place) for place, length in enumerate([10, 5, 15, 10])], 20)
    assert [len(row.input_ids) for row in rows] == [20, 20]


def test_the_order_depends_on_the_seed_alone() -> None:
    given_ = [of_length(12, place) for place in range(20)]
    assert pack(given_, 20, 1) == pack(given_, 20, 1) != pack(given_, 20, 2)


def test_an_example_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="a:3 has 21 tokens, more than 20"):
        pack([of_length(21, 3)], 20)


def loss(model: PreTrainedModel, batch: dict[str, object]) -> float:
    """Sum over the trained tokens."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"]
    assert isinstance(labels, torch.Tensor)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()


def alone(model: PreTrainedModel, example: Example) -> float:
    tensors = {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}
    return loss(model, {**tensors, "use_cache": False})


@pytest.mark.parametrize(("architecture", "attention"), [*((name, None) for name in ARCHITECTURES), ("llama", "eager")])
def test_packed_loss_equals_the_unpacked_one(architecture: str, attention: str | None) -> None:
    model, renderer = tiny_model(architecture), Renderer(tiny_tokenizer())
    if attention is not None:
        model.set_attn_implementation(attention)
    given_ = examples(renderer)
    rows = pack(given_, 192)
    assert 1 < len(rows) < len(given_)
    batch = collate(rows, pad=258)
    expected = sum(alone(model, example) for example in given_)
    assert loss(model, batch) == pytest.approx(expected, rel=1e-5)
    assert (batch["labels"] != UNTRAINED).sum() == sum(example.trained for example in given_)
    leaking = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    assert loss(model, leaking) != pytest.approx(expected, rel=1e-4), "this test would see a leak"
    check_no_leak(model)


def test_packed_mean_loss_equals_the_models_own() -> None:
    """As the Trainer computes it: over all trained tokens of the batch."""
    model, renderer = tiny_model(), Renderer(tiny_tokenizer())
    given_ = examples(renderer)
    count = sum(example.trained for example in given_)
    with torch.no_grad():
        packed = model(**collate(pack(given_, 192), pad=258), num_items_in_batch=count).loss
    assert packed.item() == pytest.approx(sum(alone(model, example) for example in given_) / count, rel=1e-5)


@pytest.mark.demo
def test_the_packed_loss_of_the_demo() -> None:
    model, given_ = demo_model(), examples(Renderer(demo_tokenizer()))[:3]
    batch = collate(pack(given_, 160), pad=2)
    expected = sum(alone(model, example) for example in given_)
    assert loss(model, batch) == pytest.approx(expected, rel=1e-5)
    leaking = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    assert loss(model, leaking) != pytest.approx(expected, rel=1e-3)
