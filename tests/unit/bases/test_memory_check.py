"""Models larger than memory are refused before they are read."""

import json
from pathlib import Path
from typing import Literal

import psutil
import pytest
import torch

from bases.base import load_base
from bases.errors import ConfigError
from bases.options import BaseOptions
from bases.preflight import LOADED, QUANTISED, UNPACKED, check_memory
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def hollow(file: Path, size: int) -> Path:
    """Make a sparse file of this size."""
    file.touch()
    with file.open("r+b") as opened:
        opened.truncate(size)
    return file


def hollow_tensor(file: Path, size: int) -> None:
    """Make a sparse safetensors file with one tensor of this many bytes."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    hollow(file, 8 + len(header) + size)


def test_model_larger_than_memory(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    file = hollow(tmp_path / "model-00001-of-00002.safetensors", 2 * total)
    with pytest.raises(ConfigError, match=r"^--model: the weights in .* need \S+ GiB of memory, and \S+ GiB are free"):
        check_memory(tmp_path, LOADED, CPU)
    check_memory(tmp_path, QUANTISED, CPU)
    hollow(file, 9 * total)
    with pytest.raises(ConfigError):
        check_memory(tmp_path, QUANTISED, CPU)
    with pytest.raises(ConfigError):
        check_memory(hollow(tmp_path / "x.gguf", 3 * total), UNPACKED, CPU)


def test_weights_in_other_formats_do_not_count(tmp_path: Path) -> None:
    hollow(tmp_path / "consolidated.safetensors", 2 * psutil.virtual_memory().total)
    check_memory(tmp_path, LOADED, CPU)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_too_large_model_is_refused_before_it_is_read(tmp_path: Path, quantization: Literal["nf4", "none"]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    hollow_tensor(tmp_path / "model/model.safetensors", 9 * psutil.virtual_memory().total)
    said: list[str] = []
    options = BaseOptions(str(tmp_path / "model"), tmp_path / "data", "cpu", quantization)
    with pytest.raises(ConfigError, match="--model: the weights in"):
        load_base(options, said.append)
    assert said == []
