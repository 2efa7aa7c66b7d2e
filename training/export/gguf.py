"""Writes merged weights as a GGUF file for llama.cpp, tensor by tensor, with the ``gguf`` package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Only the Llama architecture with a byte-level BPE
tokenizer is supported; anything else is refused before anything is written. llama.cpp does not read a
tokenizer's own splitting rules but knows some by name; a tokenizer with other rules cannot be exported.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bases.errors import BaseRejected
from bases.gguf_layout import interleave_rotary
from training.export.shards import MergedWeights
from training.progress_bar import Advance

_ROPE_FREQS = "rope_freqs.weight"
_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def check_gguf(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BaseRejected if the base cannot be written as GGUF."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llama":
        raise BaseRejected(f"--format gguf: only llama models can be exported, and this one is {config.model_type}")
    if config.hidden_act != "silu":
        raise BaseRejected(
            f"--format gguf: the activation function must be silu for llama.cpp, and is {config.hidden_act}"
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "llama3"):
        raise BaseRejected(f"--format gguf: the rotary embedding must be default or llama3, not {rope}")
    _splitting(tokenizer)


def write_gguf(
    weights: MergedWeights,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    advance: Advance = lambda _: None,
) -> None:
    """Write ``weights`` to ``file``, with the config in ``source`` and ``tokenizer``.

    Holds one tensor in memory at a time, and calls ``advance`` with the bytes of each. Raises BaseRejected.
    """
    config = AutoConfig.from_pretrained(source)
    writer = gguf.GGUFWriter(file, "llama")
    _add_shape(writer, config, file.stem, weights.dtype)
    _add_vocabulary(writer, tokenizer, config.vocab_size)
    _add_special_tokens(writer, tokenizer, source)
    freqs = _rope_factors(config)
    if freqs is not None:
        writer.add_tensor_info(_ROPE_FREQS, freqs.shape, freqs.dtype, freqs.nbytes)
    names = list(weights.base.shapes)
    for name, stored in zip(names, _stored_names(names, config.num_hidden_layers), strict=True):
        shape, dtype, raw = _storage(weights.base.shapes[name], weights.dtype)
        writer.add_tensor_info(stored, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if freqs is not None:
        writer.write_tensor_data(freqs)
    for name, tensor in weights.each(advance):
        writer.write_tensor_data(_array(_reordered(name, tensor, config)))
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: Any, name: str, dtype: torch.dtype) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Add tokens, their types and the merges. Embedding rows without a token are marked unused."""
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    types = dict.fromkeys(names, gguf.TokenType.NORMAL)
    for added in parsed["added_tokens"]:
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tokenizer))
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    merges = parsed["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Add the special tokens, whether a prompt starts with one, and the chat template."""
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    ends = _generation_ends(source) - {tokenizer.eos_token_id}
    if ends:
        # llama.cpp has a second field for an end token (EOT) and stops at either.
        writer.add_eot_token_id(min(ends))
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _generation_ends(source: Path) -> set[int]:
    file = source / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return set(found) if isinstance(found, list) else set() if found is None else {found}


def _splitting(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return llama.cpp's name for the tokenizer's rules for splitting text before merges. Raises BaseRejected."""
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = parsed["model"], parsed["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback") or parsed["normalizer"]:
        raise BaseRejected(
            "--format gguf: only byte-level BPE tokenizers can be exported, and this base has another kind"
        )
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern == _LLAMA3 and model.get("ignore_merges"):
            return "llama-bpe"
    raise BaseRejected(
        "--format gguf: the tokenizer splits text by rules that are not those of GPT-2, SmolLM or Llama 3, the only "
        "ones supported"
    )


def _stored_names(names: Iterable[str], blocks: int) -> Iterator[str]:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    for name in names:
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise BaseRejected(f"--format gguf: a llama model has no tensor {name}")
        yield stored


def _rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Return the divisors of the rotary frequencies, float32 [head_dim / 2], or None if all are 1."""
    if config.rope_parameters["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(scaled.numel(), dtype=torch.float32) / scaled.numel()
    plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    factors: np.ndarray[Any, Any] = (plain / scaled).float().numpy()
    return factors


def _storage(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[int, ...], np.dtype[Any], gguf.GGMLQuantizationType | None]:
    """Return shape, dtype and type of the array that :func:`_array` returns. Vectors stay float32, as in llama.cpp."""
    if len(shape) == 1 or dtype == torch.float32:
        return shape, np.dtype(np.float32), None
    if dtype == torch.float16:
        return shape, np.dtype(np.float16), None
    return (*shape[:-1], 2 * shape[-1]), np.dtype(np.uint8), gguf.GGMLQuantizationType.BF16


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as an array; a bfloat16 matrix as bytes, as numpy has no bfloat16."""
    if tensor.dim() == 1:
        tensor = tensor.float()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.contiguous().view(torch.uint8)
    array: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return array


def _reordered(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Return a tensor with its rows in llama.cpp's order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return tensor if heads is None else interleave_rotary(tensor, heads)
