"""Makes a random model in NF4 on the device. The cost of a step does not depend on the values of the weights."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bases.nf4 import Linear4bit

EIGHT_BILLION = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
"""The dimensions of Llama 3.1 8B."""
TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
"""A tiny model, to check that the benchmark runs."""


def random_base(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """Return a frozen bf16 model with random weights; linear layers except the output layer are in NF4."""
    with torch.device("meta"):
        model = nn.Module.to(LlamaForCausalLM(copy.deepcopy(config)), torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, _nf4(module.in_features, module.out_features, device))
    for module in model.modules():
        if not isinstance(module, Linear4bit) and any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # computes its buffers
    model.eval().requires_grad_(False)
    return model


def _nf4(inputs: int, outputs: int, device: torch.device) -> Linear4bit:
    with torch.device(device):
        layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    return layer.to(device)  # this quantises it


@dataclass(frozen=True)
class StepBytes:
    """The least that a decode step must read, in bytes."""

    weights: int
    """All weights of the base except the embedding, of which a step reads only some rows."""
    token: int
    """Keys and values of one token of context, for one row."""
    adapter: int

    def floor(self, rows: int, context: int, adapters: int) -> int:
        """Return the least bytes of a step of ``rows`` sequences with ``context`` tokens each, and ``adapters``."""
        return self.weights + rows * context * self.token + adapters * self.adapter


def step_bytes(model: LlamaForCausalLM, adapter: int) -> StepBytes:
    """Return the bytes for a model of :func:`random_base`, before its weights are repacked. ``adapter`` is in bytes."""
    weights = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            weights += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                weights += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    return StepBytes(weights, 2 * 2 * config.num_hidden_layers * (config.num_key_value_heads or 0) * width, adapter)
