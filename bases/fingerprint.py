"""Fingerprints of bases: two bases with the same fingerprint give the same answers with an adapter."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bases.double_quant import code_table
from bases.nf4 import Linear4bit

_PIECE = 64 * 2**20
"""Bytes hashed at a time, so that no tensor on a device is copied as a whole."""
_CODE_TABLE = ".weight.nested_quant_map"
"""Suffix of the name of a 4-bit layer's code table."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What identifies a base."""

    fingerprint: str
    """SHA-256 (hex) of all tensors, the quantisation settings, the tokenizer and the chat template."""
    equivalents: frozenset[str]
    """Fingerprints of the same base quantised on processors that round the table of 8-bit codes differently."""
    parts: Mapping[str, str]
    """Part of the base -> its SHA-256 or a description, to say in which parts another base differs."""


def identify(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Identity:
    """Fingerprint a model and its tokenizer.

    Call it before the first forward pass, which repacks 4-bit weights in place on some processors. Takes about a second
    per GiB and core.
    """
    settings = _settings(model)
    text = [json.dumps(settings, sort_keys=True)]
    text.append(json.dumps([_tokenizer(tokenizer), tokenizer.chat_template], sort_keys=True))
    tensors = dict(sorted(model.state_dict().items()))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        lines = dict(zip(tensors, pool.map(_tensor_line, tensors, tensors.values()), strict=True))
    whole = _sha256(*lines.values(), *text)
    rounded = _otherwise_rounded(tensors, lines)
    return Identity(
        fingerprint=whole,
        equivalents=frozenset(_sha256(*each.values(), *text) for each in rounded) - {whole},
        parts={
            "weights": _sha256(*(rounded or [lines])[0].values()),
            "quantization": _in_words(settings, model.dtype),
            "tokenizer": _sha256(_tokenizer(tokenizer)),
            "chat_template": _sha256(json.dumps(tokenizer.chat_template, sort_keys=True)),
        },
    )


def _otherwise_rounded(tensors: Mapping[str, torch.Tensor], lines: Mapping[str, bytes]) -> list[dict[str, bytes]]:
    """Return ``lines`` with each rounding of the code table; empty if the model has no code table or an unknown one."""
    names = [name for name in tensors if name.endswith(_CODE_TABLE)]
    tables = [code_table(fused=fused) for fused in (True, False)]
    if not names or not all(any(torch.equal(tensors[name].cpu(), table) for table in tables) for name in names):
        return []
    return [{**lines, **{name: _tensor_line(name, table) for name in names}} for table in tables]


def _sha256(*texts: bytes | str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() if isinstance(text, str) else text)
    return digest.hexdigest()


def _tensor_line(name: str, tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256()
    for piece in _bytes(tensor):
        digest.update(piece)
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}\n".encode()


def _bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(_PIECE):
        yield memoryview(piece.cpu().numpy())


def _settings(model: PreTrainedModel) -> Mapping[str, str | bool]:
    """Return the settings of the quantisation that the tensors do not contain."""
    layer: Any = next((module for module in model.modules() if isinstance(module, Linear4bit)), None)
    if layer is None:
        return {"quantization": "none"}
    return {
        "quantization": layer.weight.quant_state.quant_type,
        "double": layer.weight.quant_state.nested,
        "compute_dtype": str(layer.compute_dtype),
    }


def _in_words(settings: Mapping[str, str | bool], dtype: torch.dtype) -> str:
    """Return the settings as ``nf4 with double quantisation, bfloat16``."""
    twice = " with double quantisation" if settings.get("double") else ""
    return f"{settings['quantization']}{twice}, {str(dtype).removeprefix('torch.')}"


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend: str = tokenizer.backend_tokenizer.to_str()
    return backend
