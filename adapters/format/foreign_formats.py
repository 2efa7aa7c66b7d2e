"""Recognise formats other than PEFT's by file names, and explain how to convert each to PEFT's.

Only names are compared, no file is opened: so it works for a folder, an archive, a hub and a bucket alike.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from adapters.errors import AdapterRejected, printable

PICKLE = "adapter_model.bin"
"""The weights file of old PEFT releases, before safetensors."""

_PEFT_FILES = "adapter_config.json and adapter_model.safetensors"
_SAVE_AGAIN = (
    'load it with PEFT where you trust it and save it again with save_pretrained("FOLDER"), which writes '
    "adapter_model.safetensors"
)
_TRAINER_STATE = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|random_states|scaler|recipe_state|log_history).*"
)
"""Files from which a run resumes. Often pickles, they say nothing about the adapter's format."""


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """A format other than PEFT's."""

    pattern: re.Pattern[str]
    """Matches the whole path of one of its files, in lower case, with / between its parts."""
    reason: str
    """Follows the file's name in a message: what the file is, and what to do."""


def _format(pattern: str, reason: str) -> ForeignFormat:
    return ForeignFormat(re.compile(rf"(?:.*/)?(?:{pattern})"), reason)


FOREIGN_FORMATS = (
    _format(r"adapter_model\.bin", f"is a pickle, which can run code when it is read: {_SAVE_AGAIN}"),
    _format(
        r"(\d+_)?adapters\.(safetensors|npz)",
        "is an adapter of mlx-lm, which is not in PEFT's format: write each lora_a and lora_b transposed to "
        "adapter_model.safetensors, as base_model.model.<layer>.lora_A.weight and lora_B.weight, and an "
        "adapter_config.json with r = rank, lora_alpha = scale * rank and target_modules",
    ),
    _format(
        r"pytorch_lora_weights\.(safetensors|bin)",
        "is an adapter of diffusers, for a model that makes images; only adapters of language models are served",
    ),
    _format(
        r"pytorch_adapter\.bin|pytorch_model_head\.bin",
        "is an adapter of the `adapters` library (AdapterHub), not of PEFT; only LoRA as PEFT saves it is served",
    ),
    _format(
        r".*\.gguf",
        "is in llama.cpp's format (GGUF), which cannot be converted back to PEFT's: take the PEFT folder that "
        f"convert_lora_to_gguf.py was run on ({_PEFT_FILES})",
    ),
    _format(
        r".*\.nemo|model_weights\.ckpt|context/(io\.json|model\.yaml)|.*\.distcp|weights/(common\.pt|metadata\.json)",
        "is a checkpoint of NeMo or Megatron: export the adapter to PEFT's format, with llm.peft.export_lora (NeMo 2) "
        "or AutoBridge.export_adapter_ckpt (Megatron-Bridge)",
    ),
    _format(
        r"lit_model\.pth.*|lit_config\.json|iter-\d+-ckpt\.pth",
        "is a checkpoint of LitGPT (lit-gpt), which writes no PEFT adapter: merge it into a whole model with `litgpt "
        "merge_lora` and `litgpt convert_from_litgpt` and serve that with --model, or train with a tool that saves "
        "PEFT's format",
    ),
    _format(
        r"adapter_(model|\d+)\.pt|(hf|torchtune|meta)_model_\d+_\d+\.pt|ft-model-\d+-of-\d+\.safetensors",
        "is in torchtune's own format: train with FullModelHFCheckpointer and safe_serialization, which also writes "
        f"{_PEFT_FILES} for PEFT, in the folder of each epoch",
    ),
    _format(
        r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"
        r"|consolidated.*\.(pth|safetensors)",
        "is a whole model, not an adapter: serve it as a base with --model, or give the folder that PEFT's "
        f"save_pretrained has written ({_PEFT_FILES})",
    ),
    _format(
        r".*\.(tar\.(bz2|xz|zst)|tbz2?|txz|7z|rar)",
        "is an archive of a kind that is not supported: pack the adapter's folder as .tar.gz or .zip",
    ),
    _format(
        r".*\.(tar|tar\.gz|tgz|zip)",
        "is an archive among other files, and is not opened: send that archive itself, or unpack it first",
    ),
    _format(
        r".*\.(bin|pt|pth|ckpt|pkl|pickle)",
        f"is a pickle, which can run code when it is read: {_SAVE_AGAIN}",
    ),
)
"""More specific patterns first: if files match several formats, the first format here is reported."""


TYPICAL_FILES = (
    PICKLE,
    "adapters.safetensors",
    "adapter_model.pt",
    "lit_model.pth.lora",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
"""Names to look for one by one if files cannot be listed."""


def recognise(paths: Collection[str]) -> AdapterRejected | None:
    """Return an error that names the foreign format of these files; None if PEFT's weights are there, or none matches.

    ``paths``: relative, with / between their parts.
    """
    names = {path: path.rpartition("/")[2].lower() for path in paths}
    if "adapter_model.safetensors" in names.values():
        return None
    candidates = [path for path, name in names.items() if not _TRAINER_STATE.fullmatch(name)]
    for each in FOREIGN_FORMATS:
        for path in candidates:
            if each.pattern.fullmatch(path.lower()):
                return AdapterRejected(each.reason, file=printable(path))
    return None


def foreign_format_hint(paths: Collection[str]) -> str:
    """Return what :func:`recognise` finds as the end of a sentence about a missing file; empty for None."""
    other = recognise(paths)
    return f"; {other.file} {other.reason}" if other else ""
