"""The error for an adapter of another base: which parts differ, and what to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRejected
from adapters.format.spec import BaseLayout
from adapters.format.verify import verify
from bases.fingerprint import identify
from tests.adapter_folders import layout_of, write_adapter
from tests.tiny import tiny_model, tiny_tokenizer

HERE = {
    "weights": "a",
    "quantization": "nf4 with double quantisation, bfloat16",
    "tokenizer": "b",
    "chat_template": "c",
}
FINGERPRINT = "1" * 64
OTHER = "2" * 64


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    plain = layout_of(tiny_model())
    return BaseLayout(FINGERPRINT, plain.linears, plain.unserved, frozenset({"3" * 64}), HERE)


def refusal(tmp_path: Path, layout: BaseLayout, **origin: Any) -> str:
    folder = write_adapter(tmp_path / "adapter", layout)
    (folder / "manylora.json").write_text(json.dumps({"base_fingerprint": OTHER, **origin}))
    with pytest.raises(AdapterRejected) as refused:
        verify(folder, layout, 64)
    assert refused.value.file == "manylora.json"
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weights": "x"}, "they differ in the weights. "),
        ({"tokenizer": "x"}, "they differ in the tokenizer. "),
        ({"chat_template": "x"}, "they differ in the chat template. "),
        ({"weights": "x", "chat_template": "x"}, "they differ in the weights and the chat template. "),
        (
            {"weights": "x", "tokenizer": "x", "chat_template": "x"},
            "the weights, the tokenizer and the chat template. ",
        ),
        (
            {"weights": "x", "quantization": "none, float32", "tokenizer": "x"},
            "they differ in how the weights are quantised (none, float32 there, nf4 with double quantisation, bfloat16 "
            "here) and the tokenizer. ",
        ),
        ({}, "all parts that manylora.json records are the same, so they differ in something else. "),
    ],
)
def test_the_parts_that_differ_are_named(
    tmp_path: Path, layout: BaseLayout, changes: dict[str, str], told: str
) -> None:
    message = refusal(tmp_path, layout, base={"name": "theirs", "model": None}, base_parts={**HERE, **changes})
    assert f"trained on the base {OTHER} (theirs), this base is {FINGERPRINT}: " in message
    assert told in message
    assert '`"allow_base_mismatch": true` in the request or `--allow-base-mismatch` on the command line' in message


def test_an_older_manifest_names_no_parts(tmp_path: Path, layout: BaseLayout) -> None:
    assert "manylora.json does not say in which part they differ" in refusal(tmp_path, layout)


@pytest.mark.parametrize("parts", [[], "weights", {"weights": 1}])
def test_malformed_base_parts(tmp_path: Path, layout: BaseLayout, parts: object) -> None:
    assert "base_parts is not an object of strings" in refusal(tmp_path, layout, base_parts=parts)


def test_an_equivalent_base_is_this_base(tmp_path: Path, layout: BaseLayout) -> None:
    folder = write_adapter(tmp_path, layout)
    (folder / "manylora.json").write_text(json.dumps({"base_fingerprint": "3" * 64}))
    assert verify(folder, layout, 64).base_fingerprint == "3" * 64


def test_parts_are_those_of_base_parts() -> None:
    assert identify(tiny_model(), tiny_tokenizer()).parts.keys() == HERE.keys()
