"""The embedded demo model in NF4, served to a mixed batch beside two references on the very same weights.

The oracle is PEFT over the dequantised weights in float32. The engine computes in bf16 and so differs from it; how much
that alone makes, PEFT over the NF4 model itself shows, also in bf16.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.store.store import AdapterStore
from bases.base import load_base
from bases.nf4 import Linear4bit, functional
from server.config import Settings
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.engine.sequence import Failed, SamplingParams, Sequence, WeightedAdapter
from tests.adapter_folders import add
from tests.numeric.drive import recorded_logits
from tests.numeric.oracle import Mix, Oracle, kl
from tests.tiny import save_adapter

RANKS = {"small": 4, "middle": 16, "large": 64}
MIXES: list[Mix] = [(), *[((name, 1.0),) for name in RANKS], (("small", 0.5), ("large", 0.7))]
STRENGTH = 0.3
"""Strength of the random adapters: answers change, but stay language."""
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rain on a tin roof.",
    "List three prime numbers larger than ten, and say how you know that each is prime.",
)
LENGTH = 16


@dataclass(frozen=True)
class Answers:
    """One mix's answers to PROMPTS, and the logits [tokens, vocabulary] of all their tokens."""

    texts: list[str]
    engine: Tensor
    oracle: Tensor
    peft: Tensor
    base: Tensor
    """The oracle's logits without adapters."""


def serve_demo(root: Path, device: str) -> Mapping[Mix, Answers]:
    """All of PROMPTS with all of MIXES at once, then each compared over the tokens that the engine chose."""
    settings = Settings(data_dir=root, device=device, max_model_len=512, kv_memory_gib=0.1)
    base = load_base(settings.base)
    plain = _dequantised(base.model)
    folders = _save_adapters(plain, root / "adapters")
    oracle, peft = Oracle(plain, folders), Oracle(base.model, folders)
    store = AdapterStore(root / "store", base.layout, settings.max_rank)
    specs = {name: add(store, folder) for name, folder in folders.items()}
    engine = Engine(Runner(base, settings), settings, store.read, lambda events: None)
    prompts = [_encode(base.tokenizer, text) for text in PROMPTS]
    with recorded_logits(engine) as recorded:
        sequences = {}
        for mix in MIXES:
            adaptation = tuple(WeightedAdapter(specs[name].id, weight, specs[name].rank) for name, weight in mix)
            sampling = SamplingParams(temperature=0, max_tokens=LENGTH)
            sequences[mix] = [Sequence(f"{mix} {p}", list(p), sampling, adaptation) for p in prompts]
        _run(engine, [sequence for of_mix in sequences.values() for sequence in of_mix])
    engine.stop()

    def over(reference: Oracle, mix: Mix, of_mix: list[Sequence]) -> Tensor:
        return torch.cat([reference.logits(mix, s.tokens[:-1])[s.prompt_length - 1 :].cpu() for s in of_mix])

    return {
        mix: Answers(
            [base.tokenizer.decode(sequence.output) for sequence in of_mix],
            torch.stack([row for sequence in of_mix for row in recorded[sequence.id]]),
            over(oracle, mix, of_mix),
            over(peft, mix, of_mix),
            over(oracle, (), of_mix),
        )
        for mix, of_mix in sequences.items()
    }


def check_close(answers: Answers) -> None:
    """The engine is as near to the oracle as bf16 allows.

    Seen over 48 tokens an adaptation, with bitsandbytes' kernels and with ours: KL to the oracle 0.002 to 0.0035 for
    the engine and 0.002 to 0.004 for PEFT, at most 1.5 times PEFT's. Another token than the oracle's came up to 5
    times, where its two best logits lay within 0.27 (PEFT: up to 4 times, within 0.37).
    """
    assert kl(answers.engine, answers.oracle) < 0.01
    assert kl(answers.engine, answers.oracle) < 2 * kl(answers.peft, answers.oracle)
    best = answers.oracle.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.5
    agree = answers.engine.argmax(-1) == answers.oracle.argmax(-1)
    assert agree[clear].all()
    assert agree.float().mean() > 0.8


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy whose 4-bit layers are plain linears with the same values.

    Only for a model that has not been run: on some processors the first forward repacks the weights in place, and
    dequantising them afterwards gives garbage.
    """
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Linear4bit):
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.float(), requires_grad=False)
            plain.set_submodule(name, linear)
    plain.is_quantized = False
    return plain.float()


def _save_adapters(model: PreTrainedModel, root: Path) -> Mapping[str, Path]:
    lora = {"target_modules": "all-linear"}
    return {
        name: save_adapter(model, root / name, 11 + rank, STRENGTH, r=rank, lora_alpha=rank, **lora)
        for name, rank in RANKS.items()
    }


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    turns = [{"role": "user", "content": text}]
    return tuple(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])


def _run(engine: Engine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        engine.submit(sequence)
    ended = 0
    while ended < len(sequences):
        for event in engine.step():
            assert not isinstance(event, Failed), event
            ended += bool(event.finish)
