"""Models of transformers whose layers are Llama's."""

from typing import Any

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Norm before, rotary positions, a gated SiLU."""


def is_llama_shaped(model: Any) -> bool:
    """Whether a model's layers are those of CLASSES, the activation included."""
    return type(model).__name__ in CLASSES and model.config.hidden_act == "silu"
