"""GGUF files read back by transformers, their metadata, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bases.errors import BaseRejected
from bases.options import BaseOptions
from tests.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, save_adapter, tiny_model, tiny_tokenizer
from training.export.export import DType, export

TEXT = ["the ticket says that the parcel came late, and that the money should come back", "12 parcels in 2024"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, split by GPT-2's rules."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=259, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    first, _, end = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, eos_token=end, pad_token=end)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def base(root: Path, architecture: str = "llama") -> BaseOptions:
    """A tiny unquantised model with that tokenizer."""
    tiny_model(architecture).save_pretrained(root / "base")
    bpe_tokenizer().save_pretrained(root / "base")
    return options(root)


def options(root: Path) -> BaseOptions:
    return BaseOptions(str(root / "base"), root / "data", quantization="none", dtype="fp32")


def metadata(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_transformers_reads_the_merged_model_back(tmp_path: Path, dtype: DType) -> None:
    """With query and key rows in the wrong order the logits would differ completely."""
    adapter = save_adapter(tiny_model(), tmp_path / "adapter", 1, r=4, lora_alpha=8, target_modules="all-linear")
    export(adapter, base(tmp_path), tmp_path / "gguf", dtype=dtype, format="gguf")
    export(adapter, options(tmp_path), tmp_path / "plain", dtype=dtype)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf",
        gguf_file="adapter.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    expected, found = plain.state_dict(), read.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["adapter.gguf", "manylora.json"]
    assert metadata(tmp_path / "gguf" / "adapter.gguf")["general.name"] == "adapter"


def test_the_metadata_is_what_llama_cpp_needs(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [258, 256]
    model.save_pretrained(tmp_path / "base")
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    export(None, options(tmp_path), tmp_path / "out", format="gguf")
    found = metadata(tmp_path / "out" / "base.gguf")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.context_length": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.eot_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: found[key] for key in expected} == expected
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert len(found["tokenizer.ggml.tokens"]) == model.config.vocab_size
    types = found["tokenizer.ggml.token_type"]
    assert [types[index] for index in (0, ids["<|im_end|>"], len(tokenizer))] == [1, 3, 5]


def test_llama3_rotary_factors_are_exported(tmp_path: Path) -> None:
    """transformers ignores them when it reads a GGUF file, so the check must use low positions only."""
    config = tiny_model().config.to_dict() | {"rope_parameters": LLAMA3_ROPE}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "base")
    bpe_tokenizer().save_pretrained(tmp_path / "base")
    export(None, options(tmp_path), tmp_path / "out", dtype="bf16", format="gguf")
    (factors,) = (t.data for t in GGUFReader(tmp_path / "out" / "base.gguf").tensors if t.name == "rope_freqs.weight")
    assert factors.shape == (8,)
    assert factors[0] == 1
    assert factors[-1] == 8


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_another_architecture_is_refused(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(BaseRejected, match=f"only llama models can be exported, and this one is {architecture}"):
        export(None, base(tmp_path, architecture), tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_has_no_rules_for_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(BaseRejected, match="the tokenizer splits text by rules that are not"):
        export(None, options(tmp_path), tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_rotary_embeddings_of_another_kind_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    LlamaForCausalLM(LlamaConfig(**tiny_model().config.to_dict() | {"rope_parameters": rope})).save_pretrained(
        tmp_path / "base"
    )
    bpe_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(BaseRejected, match="must be default or llama3, not linear"):
        export(None, options(tmp_path), tmp_path / "out", format="gguf")
