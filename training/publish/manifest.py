"""The manifest ``manylora.json``: records how an adapter was trained.

It is part of the adapter's content, and so of its id: nothing in it depends on when or where it was trained. The date
is in the card.
"""

import hashlib
import json
import platform
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapters.format.files import HASHED, ORIGIN
from bases.base import Base
from bases.model_source import DEMO, on_hub
from bases.nf4 import Linear4bit
from training.data.dataset import Dataset
from training.judge.judge import Judgement
from training.settings import TrainSettings

FORMAT = 1
PACKAGES = ("manylora", "torch", "transformers", "peft", "bitsandbytes")

_NOT_RECORDED = {
    "name", "model", "out", "publish", "api_key", "alias", "publish_anyway", "data_dir", "device", "resume",
    "report_to", "dry_run", "show", "lint",
}  # fmt: skip
"""Settings of paths and publishing, which do not affect the weights."""
_PATHS = ("eval_file", "mix_general", "chat_template")


def manifest(
    settings: TrainSettings, base: Base, dataset: Dataset, judgement: Judgement, folder: Path
) -> dict[str, Any]:
    """Return the manifest of the adapter in ``folder``, as JSON values."""
    tokenizer: Any = base.tokenizer
    template = dataset.chat_template or tokenizer.chat_template
    return {
        "format": FORMAT,
        "base_fingerprint": base.layout.fingerprint,
        "base": {"name": base.name, "model": portable_model(settings.model)},
        "base_parts": dict(base.layout.parts),
        "quantization": quantization(base),
        "tokenizer_sha256": _sha256(tokenizer.backend_tokenizer.to_str()),
        "chat_template_sha256": None if template is None else _sha256(_text(template)),
        "data": {"sha256": dataset.data_hash, **dataset.report.counts()},
        "settings": recorded_settings(settings),
        "seed": settings.seed,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "evaluation": evaluation(judgement),
        **file_hashes(folder),
    }


def write_manifest(contents: dict[str, Any], folder: Path) -> Path:
    """Write the manifest atomically into the adapter's folder; return its path."""
    file = folder / ORIGIN
    temporary = folder / f".{ORIGIN}.tmp"
    temporary.write_text(json.dumps(contents, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)
    return file


def portable_model(model: str) -> str | None:
    """Return ``--model`` if it means the same on every machine (the demo or a hub's); None for a file or folder."""
    return model if model == DEMO or on_hub(model) else None


def quantization(base: Base) -> dict[str, Any]:
    """Return how the base's linear layers are stored."""
    layer: Any = next((module for module in base.model.modules() if isinstance(module, Linear4bit)), None)
    if layer is None:
        return {"method": "none", "dtype": _name(base.dtype)}
    state = layer.weight.quant_state
    return {
        "method": state.quant_type,
        "block_size": state.blocksize,
        "double": state.nested,
        "compute_dtype": _name(layer.compute_dtype),
    }


def recorded_settings(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings that affect the weights; files by name, without folders."""
    kept = settings.model_dump(mode="json", exclude=_NOT_RECORDED)
    kept["data"] = [Path(name).name for name in settings.data]
    for name in _PATHS:
        kept[name] = kept[name] and Path(kept[name]).name
    return kept


def evaluation(judgement: Judgement) -> dict[str, Any]:
    """Return the judgement without its samples. NaN and infinity, which JSON lacks, become null."""
    kept = asdict(replace(judgement, samples=())) | {"passed": judgement.passed}
    del kept["samples"]
    loaded: dict[str, Any] = json.loads(json.dumps(kept), parse_constant=lambda _: None)
    return loaded


def _text(template: str | dict[str, str]) -> str:
    """Return a template as text; some tokenizers have several, by name."""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    """Return the version, or None if the package is not installed, as this project need not be."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256, in hexadecimal, of the files that a server verifies."""
    return {field: _file_sha256(folder / name) for name, field in HASHED.items()}


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
