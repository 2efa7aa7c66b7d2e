"""The fingerprint of a base: two bases with one fingerprint give an adapter the same answers."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bases.nf4 import Linear4bit

_PIECE = 64 * 2**20
"""Bytes hashed at a time, so that a device tensor is never copied whole."""


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over all tensors, the quantisation settings, the tokenizer and the chat template.

    Call it before the first forward: on some processors that repacks 4-bit weights in place. Takes about a second per
    GiB and core.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        tensors = sorted(model.state_dict().items())
        for line in pool.map(lambda item: _tensor_line(*item), tensors):
            digest.update(line)
    digest.update(json.dumps(_settings(model), sort_keys=True).encode())
    digest.update(json.dumps([_tokenizer(tokenizer), tokenizer.chat_template], sort_keys=True).encode())
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
    """What of the quantisation the tensors do not say."""
    layer: Any = next((module for module in model.modules() if isinstance(module, Linear4bit)), None)
    if layer is None:
        return {"quantization": "none"}
    return {
        "quantization": layer.weight.quant_state.quant_type,
        "double": layer.weight.quant_state.nested,
        "compute_dtype": str(layer.compute_dtype),
    }


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend: str = tokenizer.backend_tokenizer.to_str()
    return backend
