"""Which base, in what form, and where it is kept."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bases.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """Which base, and in what form."""

    model: str
    """``demo``, a Hugging Face folder, a GGUF file, or a hub id."""
    data: Path
    """Quantised weights are kept under ``<data>/bases``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of activations; auto is bf16."""
    max_model_len: int | None = None
    """Tokens; None for all that the model has."""


def default_data() -> Path:
    """Where bases and adapters are kept unless told otherwise: ``manylora`` in the user's data folder (XDG)."""
    home = os.environ.get("XDG_DATA_HOME")
    try:
        return (Path(home) if home else Path.home() / ".local" / "share") / "manylora"
    except RuntimeError as error:
        raise ConfigError("--data: this user has no home folder; say where to keep data") from error
