"""The options of a base: which model, its quantisation and dtype, and where its cache is."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bases.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """Which base to load, and how."""

    model: str
    """``demo``, a Hugging Face folder, a GGUF file, or a hub id."""
    data_dir: Path
    """Folder whose ``bases`` has the cache of quantised weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of activations; auto is bf16."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer; None for the model's context length."""


def default_data_dir() -> Path:
    """Return the default folder of bases and adapters: MANYLORA_DATA_DIR, or ``manylora`` in the user's data folder.

    The server reads that variable like all its options. Commands that read none find its folder here.
    """
    if folder := os.environ.get("MANYLORA_DATA_DIR"):
        return Path(folder).expanduser()
    home = os.environ.get("XDG_DATA_HOME")
    try:
        return (Path(home) if home else Path.home() / ".local" / "share") / "manylora"
    except RuntimeError as error:
        raise ConfigError("--data-dir: this user has no home folder; give a folder for data") from error
