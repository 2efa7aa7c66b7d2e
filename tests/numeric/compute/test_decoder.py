"""The native decoder against the model's own modules, and both against float32."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HeliumConfig,
    HyperCLOVAXConfig,
    Jais2Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    NanoChatConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
    VaultGemmaConfig,
)

from adapters.format.spec import AdapterId, AdapterSpec, LoraTarget
from adapters.format.weights import AdapterWeights
from bases.base import Base, make_base
from bases.nf4 import Linear4bit, functional
from server.compute.backend import Forward
from server.compute.cpu.backend import CpuBackend
from server.compute.cpu.decoder import Decoder
from server.compute.cpu.kernels import Kernels
from server.compute.model_inputs import ForwardOutput, transformers_forward
from server.compute.reference.backend import EagerForward
from server.config import Settings
from server.engine.runner import Runner
from server.engine.sequence import Adaptation, Batch, Chunk, SamplingParams, Sequence, WeightedAdapter
from tests.numeric.kernels import require_compiler, runnable
from tests.tiny import tiny_tokenizer

SHAPE = {
    **{"vocab_size": 200, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256},
}
ROTARY = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
STRETCH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
WIDE = {**{name: value for name, value in SHAPE.items() if name != "head_dim"}, "hidden_size": 128, "pad_token_id": 0}
WIDER = {**WIDE, "num_attention_heads": 1, "num_key_value_heads": 1}
PARTLY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 16, "long_factor": [4.0] * 16}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**SHAPE, "head_dim": 256, "query_pre_attn_scalar": 100, "sliding_window": 7, "layer_types": MIXED}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
YARN |= {"llama_4_scaling_beta": 0.1}
SHORT_YARN = YARN | {"original_max_position_embeddings": 64}
MULTIPLIERS = {
    **{"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 7.0},
}
ODD = {**SHAPE, "hidden_size": 72, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
ODD |= {"head_dim": 24, "vocab_size": 201}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama 3": LlamaConfig(**SHAPE, attention_bias=True, rope_parameters={**ROTARY, **STRETCH}),
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
    "qwen 2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen 2 of 7B": Qwen2Config(**{**SHAPE, "intermediate_size": 18944}),
    "qwen 3": Qwen3Config(**SHAPE),
    "ministral": MinistralConfig(**SHAPE, sliding_window=7, layer_types=MIXED),
    "seed oss": SeedOssConfig(**SHAPE, attention_bias=True),
    "phi 3": Phi3Config(**WIDE, sliding_window=7),
    "phi 4 mini": Phi3Config(**WIDER, rope_parameters=PARTLY),
    "phi 3 longrope": Phi3Config(**WIDE, original_max_position_embeddings=128, rope_parameters=LONGROPE),
    "heads 80 wide": Qwen3Config(**{**SHAPE, "head_dim": 80}),
    "heads 100 wide": LlamaConfig(**{**SHAPE, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 100}),
    "gemma": GemmaConfig(**SHAPE),
    "gemma 2": Gemma2Config(**GEMMA, attn_logit_softcapping=0.1, final_logit_softcapping=0.2),
    "gemma 3": Gemma3TextConfig(**GEMMA, rope_parameters={"full_attention": ROTARY | STRETCH, "sliding_attention": {}}),
    "granite": GraniteConfig(**SHAPE, **MULTIPLIERS),
    "hyperclova x": HyperCLOVAXConfig(**SHAPE, **MULTIPLIERS, use_post_norm=True),
    "glm": GlmConfig(**SHAPE, pad_token_id=0),
    "glm 4": Glm4Config(**{**SHAPE, "head_dim": 96}, pad_token_id=0),
    "ernie 4.5": Ernie4_5Config(**SHAPE),
    "helium": HeliumConfig(**{**SHAPE, "hidden_size": 128}),
    "arcee": ArceeConfig(**SHAPE),
    "ministral 3": Ministral3Config(**SHAPE, rope_parameters=YARN),
    "cwm": CwmConfig(**SHAPE, sliding_window=7, layer_types=MIXED, rope_parameters=ROTARY | STRETCH),
    "vaultgemma": VaultGemmaConfig(**GEMMA, final_logit_softcapping=0.2),
    "smollm 3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1], pad_token_id=0),
    "olmo 2": Olmo2Config(**SHAPE),
    "olmo 3": Olmo3Config(**SHAPE, sliding_window=7, layer_types=MIXED),
    "exaone 4": Exaone4Config(**SHAPE, sliding_window=7, layer_types=MIXED),
    "olmo": OlmoConfig(**SHAPE),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.3),
    "cohere 2": Cohere2Config(**SHAPE, sliding_window=7, layer_types=MIXED, logit_scale=0.3),
    "starcoder 2": Starcoder2Config(**WIDE, sliding_window=7),
    "jais 2": Jais2Config(**SHAPE),
    "phi 2": PhiConfig(**WIDE),
    "phi with norms": PhiConfig(**{**WIDE, "hidden_size": 160}, hidden_act="gelu", qk_layernorm=True),
    "persimmon": PersimmonConfig(**WIDE),
    "pythia": GPTNeoXConfig(**WIDE),
    "gpt neox in turn": GPTNeoXConfig(**{**WIDE, "hidden_size": 100}, use_parallel_residual=False),
    "hidden 72": LlamaConfig(**ODD, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "hidden 100": Qwen3Config(**{**ODD, "hidden_size": 100, "intermediate_size": 1000, "head_dim": 20}),
    "hidden 968": Qwen2Config(**{**ODD, "hidden_size": 968, "intermediate_size": 200, "head_dim": 72}),
    "hidden 96, heads 96": Gemma2Config(
        **{**GEMMA, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 96}
    ),
    "hidden 61": Qwen2Config(**{**ODD, "hidden_size": 61, "intermediate_size": 77, "head_dim": 10}),
    "hidden 90, all heads": Olmo2Config(**{**ODD, "hidden_size": 90, "head_dim": 30, "num_key_value_heads": 3}),
    "fused and odd": Phi3Config(
        **{**WIDE, "hidden_size": 100, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 50}
    ),
}
ROUGHER = {"phi 2": 0.006, "persimmon": 0.006}
"""The modules' gelu_new rounds after each of its operations, the kernels do not; a square doubles a difference."""
EVERY = ("proj", "dense", "_h", "_4h", "query_key_value", "c_fc", "fc1", "fc2")
"""Ends of the names of all layers' linear layers."""
SOME = ("q_proj", "v_proj", "up_proj", "query_key_value", "dense_h_to_4h")
ADAPTERS: list[Adaptation] = [
    (),
    (WeightedAdapter(AdapterId("a"), 1.0, 16),),
    (WeightedAdapter(AdapterId("b"), 1.0, 5),),
    (WeightedAdapter(AdapterId("a"), 0.5, 16), WeightedAdapter(AdapterId("b"), -0.7, 5)),
]
LENGTHS = (1, 1, 1, 1, 40, 3, 17, 2)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    require_compiler()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def quantised(config: PreTrainedConfig) -> Any:
    """A random model whose decoder's layers are NF4, the rest bf16; norms and biases are not what they begin as."""
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(copy.deepcopy(config))
        .to(torch.bfloat16)
        .eval()
        .requires_grad_(requires_grad=False)
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "layers" in name:
            bias = layer.bias is not None
            four = Linear4bit(layer.in_features, layer.out_features, bias, torch.bfloat16, quant_type="nf4")
            four.weight.data = layer.weight.data * 3
            if bias:
                four.bias = layer.bias
            model.set_submodule(name, four.to("cpu").requires_grad_(requires_grad=False))
    return model


def in_float32(model: Any) -> Any:
    """The same weights without rounding in between."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None)
            plain.weight.data = weight
            if layer.bias is not None:
                plain.bias.data = layer.bias.data
            model.set_submodule(name, plain)
    return nn.Module.float(model)


@dataclass
class Lab:
    """One model behind the runner."""

    config: PreTrainedConfig
    data: Path
    changes: dict[str, int] = field(default_factory=dict)
    kernels: Kernels | None = None

    def __post_init__(self) -> None:
        self.base: Base = make_base(quantised(self.config), tiny_tokenizer(), "tiny", "cpu", max_model_len=128)
        settings = Settings(data_dir=self.data, device="cpu", kv_memory_gib=0.01, max_model_len=128, **self.changes)
        backend = self.kernels and CpuBackend(torch.device("cpu"), torch.bfloat16, self.kernels)
        self.runner = Runner(self.base, settings, backend)
        self.decoder: Forward = self.runner.forward
        self.modules: Forward = EagerForward(self.runner.model, transformers_forward(self.base.model))

    def place(self, adapter: str, rank: int, pages: tuple[int, ...], *leaves: str) -> None:
        generator = torch.Generator().manual_seed(rank)
        tensors = {
            name: (torch.randn(rank, i, generator=generator) / i**0.5, torch.randn(o, rank, generator=generator) * 0.1)
            for name, (i, o) in self.base.layout.linears.items()
            if name.endswith(leaves)
        }
        spec = AdapterSpec(AdapterId(adapter), {name: LoraTarget(rank, 1.0) for name in tensors}, 0)
        self.runner.place(AdapterId(adapter), pages, self.runner.pool.pack(AdapterWeights(spec, tensors)))

    def logits(self, adaptations: list[Adaptation]) -> tuple[Tensor, Tensor]:
        """[rows, vocabulary] of prompts of LENGTHS in one step after their first token, and the first layer's keys."""
        batches: list[list[Chunk]] = [[], []]
        for i, length in enumerate(LENGTHS):
            tokens = [(7 * i + 13 * j) % 200 for j in range(length + 1)]
            sequence = Sequence(f"{i}", tokens, SamplingParams(), adaptations[i % len(adaptations)])
            sequence.blocks = list(range(i * 4, i * 4 + 4))
            batches[0].append(Chunk(sequence, 0, 1))
            batches[1].append(Chunk(sequence, 1, length))
        self.runner.kv.clear(range(4 * len(LENGTHS)))
        for chunks in batches:
            logits = self.runner.compute(Batch(tuple(chunks))).logits
        return logits, self.runner.kv.layers[0][0].clone()

    def outputs(self, adaptations: list[Adaptation]) -> ForwardOutput:
        """Logits and hidden states of prompts of LENGTHS in one step: by turns, one has logits, two are pooled."""
        asks: list[dict[str, Any]] = [{"prompt_logprobs": 0}, {"pooling": "mean"}, {"pooling": "last"}]
        chunks = []
        for i, length in enumerate(LENGTHS):
            tokens = [(7 * i + 13 * j) % 200 for j in range(length)]
            sequence = Sequence(f"{i}", tokens, SamplingParams(), adaptations[i % len(adaptations)], **asks[i % 3])
            sequence.blocks = list(range(i * 4, i * 4 + 4))
            chunks.append(Chunk(sequence, 0, length))
        self.runner.kv.clear(range(4 * len(LENGTHS)))
        return self.runner.compute(Batch(tuple(chunks)))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_is_the_models_modules(name: str, tmp_path: Path) -> None:
    lab = Lab(CONFIGS[name], tmp_path)
    lab.place("b", 5, (4,), *SOME)
    lab.place("a", 16, (3, 9), *EVERY)  # the first that needs memory in some layers
    assert isinstance(lab.decoder, Decoder)
    plain: list[Tensor] = []
    for adaptations in ([()], ADAPTERS):
        lab.runner.forward = lab.decoder
        mine, my_keys = lab.logits(adaptations)
        lab.runner.forward = lab.modules
        theirs, their_keys = lab.logits(adaptations)
        assert (my_keys != their_keys).float().mean() < 0.005, "the first layer differs by a last bit here and there"
        assert error(mine, theirs) < ROUGHER.get(name, 0.004), (
            "rounded elsewhere than the modules round, it would be more"
        )
        plain = plain or list(mine)
    changed = [not torch.equal(row, before) for row, before in zip(mine, plain, strict=True)]
    assert changed == [bool(ADAPTERS[i % len(ADAPTERS)]) for i in range(len(LENGTHS))]


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_logits_of_prompts_are_the_models_modules(name: str, tmp_path: Path) -> None:
    lab = Lab(CONFIGS[name], tmp_path)
    lab.place("b", 5, (4,), *SOME)
    lab.place("a", 16, (3, 9), *EVERY)
    mine = lab.outputs(ADAPTERS)
    lab.runner.forward = lab.modules
    theirs = lab.outputs(ADAPTERS)
    assert mine.hidden is not None
    assert theirs.hidden is not None
    assert mine.hidden.dtype == theirs.hidden.dtype == torch.float32
    most = ROUGHER.get(name, 0.004)
    assert error(mine.logits, theirs.logits) < most
    assert error(mine.hidden, theirs.hidden) < most


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_is_as_near_to_float32_as_the_modules_are(name: str, tmp_path: Path) -> None:
    lab = Lab(CONFIGS[name], tmp_path)
    assert isinstance(lab.decoder, Decoder)
    mine, _ = lab.logits([()])
    lab.runner.forward = lab.modules
    theirs, _ = lab.logits([()])
    truth = in_float32(quantised(CONFIGS[name]))
    with torch.inference_mode():
        prompts = ([(7 * i + 13 * j) % 200 for j in range(n + 1)] for i, n in enumerate(LENGTHS))
        exact = torch.stack([truth(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert error(theirs, exact) < 0.05
    assert error(mine, exact) < 1.3 * error(theirs, exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_processor_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    """On AMX, too, by its tile instructions written in C where this processor has none."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for kernels in runnable():
        lab = Lab(CONFIGS[name], tmp_path, kernels=kernels)
        assert isinstance(lab.decoder, Decoder)
        lab.place("b", 5, (4,), *SOME)
        lab.place("a", 16, (3, 9), *EVERY)
        found[kernels.variant.name] = lab.logits(ADAPTERS)
    first, *others = found
    if not others:
        pytest.skip(f"this processor runs {first} alone")
    for other in others:
        for one, another in zip(found[first], found[other], strict=True):
            assert torch.equal(one, another), f"{first} and {other}"


@pytest.mark.parametrize("name", ["qwen 3", "phi 4 mini", "gemma 2", "olmo 2", "phi 2", "hidden 72", "hidden 61"])
def test_a_row_does_not_depend_on_the_others(name: str, kernels: Kernels, tmp_path: Path) -> None:
    """More rows are sampled than the output layer takes at once."""
    lab = Lab(CONFIGS[name], tmp_path, kernels=kernels)
    lab.place("a", 16, (3, 9), "proj")
    sequences = [Sequence(f"{i}", [i, 2 * i], SamplingParams(), ADAPTERS[i % 2]) for i in range(70)]
    for i, sequence in enumerate(sequences):
        sequence.blocks = [i]
    together = lab.runner.compute(Batch(tuple(Chunk(sequence, 0, 2) for sequence in sequences))).logits
    for sequence, expected in zip(sequences, together, strict=True):
        lab.runner.compute(Batch((Chunk(sequence, 0, 1),)))
        alone = lab.runner.compute(Batch((Chunk(sequence, 1, 1),))).logits
        assert torch.equal(alone[0], expected)


@pytest.mark.parametrize("name", ["llama 3", "hidden 968", "hidden 61"])
def test_a_row_that_is_not_finite_stays_so_and_alone(name: str, tmp_path: Path) -> None:
    lab = Lab(CONFIGS[name], tmp_path)
    lab.base.model.model.embed_tokens.weight[5] = torch.nan
    sequences = [Sequence(f"{token}", [token], SamplingParams()) for token in (4, 5, 6)]
    for i, sequence in enumerate(sequences):
        sequence.blocks = [i]
    logits = lab.runner.compute(Batch(tuple(Chunk(sequence, 0, 1) for sequence in sequences))).logits
    assert logits[[0, 2]].isfinite().all()
    assert not logits[1].isfinite().any()


def test_a_step_that_finds_another_steps_mapping_stops(tmp_path: Path) -> None:
    """The kernels would write outside of their outputs."""
    lab = Lab(CONFIGS["llama"], tmp_path)
    lab.place("a", 16, (3, 9), "proj")
    lab.runner.forward = lab.modules
    lab.logits(ADAPTERS[:2])
    with pytest.raises(AssertionError, match="not this step's"):
        lab.runner._record_layers()


NOT_NATIVE: list[tuple[PreTrainedConfig, dict[str, int], str]] = [
    (CONFIGS["llama"], {"block_size": 8}, "--block-size a multiple of 16"),
    (NanoChatConfig(**SHAPE), {}, "no native decoder for NanoChatForCausalLM"),
    (OlmoConfig(**SHAPE, clip_qkv=1.0), {}, "clip_qkv"),
    (
        Ministral3Config(**SHAPE, rope_parameters=YARN | {"original_max_position_embeddings": 64}),
        {},
        "beyond 64 tokens",
    ),
    (LlamaConfig(**SHAPE, hidden_act="tanh"), {}, "its activation is tanh"),
    (LlamaConfig(**{**SHAPE, "head_dim": 288}), {}, "heads up to 256 wide"),
]


@pytest.mark.parametrize(("config", "change", "reason"), NOT_NATIVE, ids=[reason for *_, reason in NOT_NATIVE])
def test_layers_one_by_one_are_said_with_the_reason(
    config: PreTrainedConfig, change: dict[str, int], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lab = Lab(config, tmp_path, change)
    assert isinstance(lab.decoder, EagerForward)
    assert any("one by one" in record.message and reason in record.message for record in caplog.records)


def error(x: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, of that of ``expected``."""
    return ((x - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()
