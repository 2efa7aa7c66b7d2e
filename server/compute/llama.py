"""Models of transformers whose decoder layers are built like Llama's."""

from typing import Any

LLAMA_SHAPED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""With RMSNorm before attention and before the MLP, rotary positions, and a gated MLP."""


def is_llama_shaped(model: Any) -> bool:
    """Whether a model is one of LLAMA_SHAPED, with SiLU as its activation."""
    return type(model).__name__ in LLAMA_SHAPED and model.config.hidden_act == "silu"
