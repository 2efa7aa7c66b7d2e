"""Tiny random models, a byte tokenizer and random adapters, built in code: no files, no network.

Weights are drawn wide (std 0.2 and more) so that greedy answers wander over the vocabulary: a model that repeats one
token would pass any test.
"""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 264
"""256 bytes, the special tokens, and a few ids that no text encodes to."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 256
"""Maximum context of the tiny models, in tokens."""
WINDOW = 12
"""Sliding window of the models that have one, in tokens: shorter than any test's sequences."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, head_dim=16, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**_SHAPE, "tie_word_embeddings": True})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=24)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_SHAPE,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
        )
    ),
}
"""Sliding windows everywhere (Mistral), qkv biases and tied embeddings (Qwen2), q/k norms (Qwen3), fused projections
(Phi-3), soft-capping with alternating windows (Gemma-2; its caps are low enough to bend these logits)."""


def tiny_model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in eval mode; the same (architecture, seed) gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture]().float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _draw(name, parameter)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def _draw(name: str, parameter: nn.Parameter) -> None:
    """Norms near their neutral value, biases and embeddings wide, projections at about twice unit gain."""
    if "norm" in name:
        parameter.add_(torch.randn_like(parameter) * 0.2)
    elif parameter.dim() == 1:
        parameter.normal_(std=0.5)
    elif "embed" in name:
        parameter.normal_(std=0.1)
    else:
        parameter.normal_(std=2.0 / math.sqrt(parameter.shape[1]))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML turns, ``<|im_end|>`` as end and padding. Any text encodes and decodes to itself."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[2],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_adapter(model: PreTrainedModel, folder: Path, seed: int, strength: float = 0.7, **lora: object) -> Path:
    """Write a random adapter for ``model`` with PEFT itself; ``lora`` goes to ``LoraConfig``. Returns ``folder``.

    ``strength`` is about the size of the update relative to the layer's own output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **lora))
        with torch.no_grad():
            for module in peft.modules():
                if hasattr(module, "lora_A") and "default" in module.lora_A:
                    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                    a.normal_(std=1 / math.sqrt(a.shape[1]))
                    b.normal_(std=strength / math.sqrt(b.shape[1]) / module.scaling["default"])
        peft.save_pretrained(folder)
    return folder


def fused(architecture: str) -> bool:
    """Return whether q, k and v are one layer in this architecture."""
    return architecture == "phi3"


def adapter_variants(architecture: str) -> Mapping[str, Mapping[str, object]]:
    """Name -> ``LoraConfig`` arguments: ranks 1 to 24, every way PEFT has of saying rank, scale and targets."""
    attention = ["qkv_proj"] if fused(architecture) else ["q_proj", "v_proj"]
    up = "gate_up_proj" if fused(architecture) else "up_proj"
    return {
        "all": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "one": {"r": 1, "lora_alpha": 1, "target_modules": attention},
        "odd": {"r": 5, "lora_alpha": 7, "target_modules": [*attention, "o_proj", "down_proj"]},
        "rslora": {"r": 24, "lora_alpha": 12, "use_rslora": True, "target_modules": "all-linear"},
        "patterns": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*attention, up, "down_proj"],
            "rank_pattern": {attention[0]: 12, r"layers\.1\..*\.down_proj": 2},
            "alpha_pattern": {up: 3},
        },
        "last": {"r": 16, "lora_alpha": 32, "target_modules": attention, "layers_to_transform": [1]},
    }


def save_variants(architecture: str, root: Path, seed: int = 0) -> dict[str, Path]:
    """All of :func:`adapter_variants` for ``tiny_model(architecture, seed)``, one folder each under ``root``."""
    model = tiny_model(architecture, seed)
    return {
        name: save_adapter(model, root / name, seed=100 + index, **lora)
        for index, (name, lora) in enumerate(adapter_variants(architecture).items())
    }
