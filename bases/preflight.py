"""Checks of a model before its weights are read: files, config, tokenizer and memory. Serving, training and doctor
begin with them.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from bases import machine
from bases.architecture import check_architecture, check_context
from bases.errors import BaseRejected, ConfigError
from bases.model_source import ModelSource

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LOADED = 1.0
"""Share of the weight files that is in memory in the end: all of it."""
QUANTISED = 1 / 8
"""The same for weights that are quantised while they are read, at least: float32 becomes 4 bits, layer by layer."""
UNPACKED = 1 / 2
"""The same for a GGUF file, at least: float32 becomes bfloat16, and all of it is in memory before it is saved."""
_LFS = b"version https://git-lfs"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")


def check_source(source: ModelSource, max_model_len: int | None = None) -> None:
    """Raise BaseRejected if a model cannot be served, and ConfigError for ``max_model_len``.

    Takes seconds: checks the architecture without weights, and of the weights only the headers.
    """
    if source.gguf:
        check_gguf(source.path)
    config = _read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise BaseRejected(f"the weights of {source.name} are already quantised; give the original model")
    try:
        check_architecture(config)
        check_context(config, context_length(config, max_model_len))
    except BaseRejected as error:
        raise BaseRejected(f"{source.name} cannot be served: {error}") from error
    if not source.gguf:
        _check_weights(source.path)
        read_tokenizer(source.path)


def context_length(config: PreTrainedConfig, wanted: int | None) -> int:
    """Return the most tokens of prompt and answer together. Raises BaseRejected or ConfigError."""
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is None:
        raise BaseRejected("its config does not say how long its context is (max_position_embeddings)")
    if most < 1:
        raise BaseRejected(f"its config gives a context of {most} tokens (max_position_embeddings)")
    if wanted is not None and wanted > most:
        raise ConfigError(f"--max-model-len: must be at most {most}, the context of this model (got {wanted})")
    return wanted or most


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a Hugging Face folder. Raises BaseRejected if it is missing or cannot be served."""
    if not any(found for name in _VOCABULARIES for found in folder.glob(name)):
        raise BaseRejected(
            f"{folder} has no tokenizer: copy the model's tokenizer.json and tokenizer_config.json there"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # invalid files raise errors of any kind
        raise BaseRejected(f"the tokenizer in {folder} cannot be read: {reason(error)}") from error
    try:
        check_tokenizer(tokenizer)
    except BaseRejected as error:
        raise BaseRejected(f"{folder} cannot be served: {error}") from error
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BaseRejected if a tokenizer has no vocabulary, or is not one that the server can stream text with."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise BaseRejected("its tokenizer is not one of the `tokenizers` library")
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens):
        raise BaseRejected("its tokenizer has no vocabulary except special tokens")


def reason(error: Exception) -> str:
    """Return an error's message on one line, 300 characters at most."""
    words = " ".join(str(error).split())
    return (words if len(words) <= 300 else f"{words[:300]}...") or type(error).__name__


def _read_config(source: ModelSource) -> PreTrainedConfig:
    """Read the config of the model."""
    folder, gguf_file = (source.path.parent, source.path.name) if source.gguf else (source.path, None)
    if gguf_file is None:
        _check_config_file(folder / "config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
    except Exception as error:  # invalid configs raise errors of any kind
        raise BaseRejected(f"transformers cannot load {source.path}: {reason(error)}") from error
    return config


def _check_config_file(file: Path) -> None:
    """Raise BaseRejected if a file is not the config of a model that transformers knows."""
    config = _read_object(file)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise BaseRejected(f"{file} has no model_type, so it is not a model's config")
    if kind not in transformers.CONFIG_MAPPING:
        own = "; code that comes with a model is not run" if "auto_map" in config else ""
        raise BaseRejected(f"{file}: transformers {transformers.__version__} has no models of type {kind!r}{own}")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BaseRejected(f"{file} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(found, dict):
        raise BaseRejected(f"{file} is not a JSON object")
    return found


def _check_weights(folder: Path) -> None:
    """Raise BaseRejected if a file of the weights is missing or incomplete."""
    if (folder / WHOLE).is_file():
        _keys(folder / WHOLE)
        return
    if not (folder / INDEX).is_file():
        raise BaseRejected(_no_weights(folder))
    files = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise BaseRejected(f"{folder / INDEX} has no weight_map that names a file for each tensor")
    for name in files.values():
        if not _within(name):
            raise BaseRejected(f"{folder / INDEX} names {name[:80]!r}, which is not a file of that folder")
    if missing := sorted({name for name in files.values() if not (folder / name).is_file()}):
        raise BaseRejected(f"{folder} lacks {_listed(missing)}, which {INDEX} names: the model is incomplete")
    for name in sorted(set(files.values())):
        if missing := sorted({key for key, place in files.items() if place == name} - _keys(folder / name)):
            raise BaseRejected(f"{folder / name} lacks the tensors {_listed(missing)}, which {INDEX} says it has")


def _within(name: str) -> bool:
    """Return whether a name from an index is that of a file in the model's own folder."""
    path = Path(name)
    return (
        bool(path.parts)
        and len(name) < 256
        and name.isprintable()
        and not path.is_absolute()
        and ".." not in path.parts
    )


def _keys(file: Path) -> set[str]:
    """Return the names of the tensors. Reads the header, which must cover the whole file."""
    try:
        with safe_open(file, framework="numpy") as opened:  # torch would allocate memory for the whole file
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        with file.open("rb") as start:
            if start.read(len(_LFS)) == _LFS:
                raise BaseRejected(
                    f"{file} is a Git LFS pointer, not the file: run `git lfs pull` in its folder"
                ) from error
        size = file.stat().st_size
        raise BaseRejected(
            f"{file} is damaged or incomplete ({size:,} bytes; {reason(error)}): copy or download it again"
        ) from error


def _no_weights(folder: Path) -> str:
    for pattern, problem in (
        ("*.gguf", "has a GGUF file, but no safetensors: give --model the path of that file"),
        (
            "*.bin",
            "has pickled weights only ({name}), which can run code when they are loaded: save them as safetensors",
        ),
        (
            "*.pt*",
            "has pickled weights only ({name}), which can run code when they are loaded: save them as safetensors",
        ),
        ("*.safetensors", "has {name}, but neither " + WHOLE + " nor " + INDEX + ": it is not in Hugging Face layout"),
    ):
        if found := sorted(folder.glob(pattern)):
            return f"{folder} {problem.format(name=found[0].name)}"
    return f"{folder} has no weights: neither {WHOLE} nor {INDEX}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_memory(weights: Path, share: float, device: torch.device) -> None:
    """Raise ConfigError if ``share`` of the weights, a file or a folder of safetensors, does not fit on ``device``.

    Without this check the system would kill the process.
    """
    files = [weights] if weights.is_file() else weights.glob("model*.safetensors")
    needed = share * sum(file.stat().st_size for file in files)
    free = machine.free_memory(device)
    if needed <= free:
        return
    limit = machine.memory().limit if device.type == "cpu" else None
    within = f" in this container, by {limit}" if limit else ""
    raise ConfigError(
        f"--model: the weights in {weights} need {needed / 2**30:.2f} GiB of memory, and {free / 2**30:.2f} GiB "
        f"are free{within}; take a smaller model, or give it more memory"
    )


def check_gguf(file: Path) -> None:
    """Raise BaseRejected if a file is not a GGUF file, or is cut short. Takes seconds."""
    try:
        GGUFReader(file)
    except Exception as error:  # an incomplete file raises errors of any kind
        raise BaseRejected(
            f"{file} is not a GGUF file, or is damaged or incomplete ({file.stat().st_size:,} bytes; {reason(error)}): "
            "copy or download it again"
        ) from error
