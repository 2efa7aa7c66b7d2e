"""Pooling of embeddings, as the files of sentence-transformers beside a model say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bases.base import load_base
from bases.errors import BaseRejected
from bases.model_source import read_pooling_modes
from bases.options import BaseOptions
from tests.tiny import tiny_model, tiny_tokenizer


def write_modules(folder: Path, config: Mapping[str, Any]) -> Path:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        (
            {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
            ("lasttoken",),
        ),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("cls", "max")),
        ({"embedding_dimension": 64, "pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
        ({}, ()),
    ],
    ids=str,
)
def test_the_files_of_sentence_transformers(tmp_path: Path, config: Mapping[str, Any], modes: tuple[str, ...]) -> None:
    assert read_pooling_modes(write_modules(tmp_path, config)) == modes


def test_a_model_without_such_files_says_nothing(tmp_path: Path) -> None:
    assert read_pooling_modes(tmp_path) == ()


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"type": "x.Pooling", "path": "gone"}]'])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(BaseRejected, match=r"modules\.json"):
        read_pooling_modes(tmp_path)


def test_a_base_knows_what_the_files_beside_its_source_say(tmp_path: Path) -> None:
    source = tmp_path / "tiny"
    tiny_model().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    for quantization in ("none", "nf4"):
        options = BaseOptions(str(source), tmp_path / "data", "cpu", quantization, "fp32", None)
        assert load_base(options).pooling_modes == ()
    write_modules(source, {"pooling_mode_mean_tokens": True})
    for quantization in ("none", "nf4"):
        options = BaseOptions(str(source), tmp_path / "data", "cpu", quantization, "fp32", None)
        assert load_base(options).pooling_modes == ("mean",)
