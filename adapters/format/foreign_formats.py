"""Formats that are not PEFT's, told by the names of their files: what each is, and how to get an adapter out of it.

Nothing is read but names, so that it costs nothing to say, wherever an adapter comes from.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from adapters.errors import AdapterRejected, shown

PICKLE = "adapter_model.bin"
"""What PEFT wrote before it wrote safetensors."""

_WANTED = "adapter_config.json and adapter_model.safetensors"
_SAVE_AGAIN = (
    'load it with PEFT where you trust it and save it again with save_pretrained("FOLDER"), which writes '
    "adapter_model.safetensors"
)
_STATE = re.compile(r"(training_args|optimizer|scheduler|rng_state|random_states|scaler|recipe_state|log_history).*")
"""What a run leaves to go on from: pickles beside every trainer's adapter, whatever the adapter's own format is."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format by its files."""

    pattern: re.Pattern[str]
    """For a whole path, in lower case, with / between its parts."""
    reason: str
    """To be read after the file's name: what it is, and the way out."""


def _format(pattern: str, reason: str) -> Format:
    return Format(re.compile(rf"(?:.*/)?(?:{pattern})"), reason)


FORMATS = (
    _format(r"adapter_model\.bin", f"is a pickle, which can run code when it is read: {_SAVE_AGAIN}"),
    _format(
        r"(\d+_)?adapters\.(safetensors|npz)",
        "is an adapter of mlx-lm, which is not in PEFT's format: write each lora_a and lora_b transposed to "
        "adapter_model.safetensors, as base_model.model.<layer>.lora_A.weight and lora_B.weight, and an "
        "adapter_config.json with r = rank, lora_alpha = scale * rank and target_modules",
    ),
    _format(
        r"pytorch_lora_weights\.(safetensors|bin)",
        "is an adapter of diffusers, for a model that makes images; adapters of language models are served",
    ),
    _format(
        r"pytorch_adapter\.bin|pytorch_model_head\.bin",
        "is an adapter of the `adapters` library (AdapterHub), not of PEFT; only LoRA as PEFT saves it is served",
    ),
    _format(
        r".*\.gguf",
        "is in llama.cpp's format (GGUF), from which PEFT's cannot be made again: take the PEFT folder that "
        f"convert_lora_to_gguf.py has read ({_WANTED})",
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
        f"{_WANTED} for PEFT, in the folder of each epoch",
    ),
    _format(
        r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"
        r"|consolidated.*\.(pth|safetensors)",
        "is a whole model, not an adapter: serve it as a base with --model, or give the folder that PEFT's "
        f"save_pretrained has written ({_WANTED})",
    ),
    _format(
        r".*\.(tar\.(bz2|xz|zst)|tbz2?|txz|7z|rar)",
        "is packed in a way that is not read here: pack the adapter's folder as .tar.gz or .zip",
    ),
    _format(
        r".*\.(tar|tar\.gz|tgz|zip)",
        "is an archive within what came, and is not opened: bring that archive itself, or unpack it first",
    ),
    _format(
        r".*\.(bin|pt|pth|ckpt|pkl|pickle)",
        f"is a pickle, which can run code when it is read: {_SAVE_AGAIN}",
    ),
)
"""The more telling before the less: of files of several formats, the first one that is found here is named."""


TELLING = (
    PICKLE,
    "adapters.safetensors",
    "adapter_model.pt",
    "lit_model.pth.lora",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
"""Names to ask for one by one where files cannot be listed."""


def recognise(paths: Collection[str]) -> AdapterRejected | None:
    """Why files that lack PEFT's weights hold no adapter; None where they are there, or the names say nothing."""
    names = {path: path.rpartition("/")[2].lower() for path in paths}
    if "adapter_model.safetensors" in names.values():
        return None
    telling = [path for path, name in names.items() if not _STATE.fullmatch(name)]
    for each in FORMATS:
        for path in telling:
            if each.pattern.fullmatch(path.lower()):
                return AdapterRejected(each.reason, file=shown(path))
    return None


def instead(paths: Collection[str]) -> str:
    """What :func:`recognise` says, to be put after a sentence that names what is missing."""
    other = recognise(paths)
    return f"; {other.file} {other.reason}" if other else ""
