"""Memory at start: the size of the KV cache, and weights are in memory once."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bases import machine
from bases.base import Base, load_base, make_base
from bases.errors import ConfigError
from bases.nf4 import functional
from bases.options import BaseOptions
from server.compute import choose_backend
from server.compute.attention import block_bytes
from server.compute.pool import AdapterPool
from server.compute.reference.backend import ReferenceBackend
from server.config import Settings
from server.engine.kv_memory import CPU_SHARE, TYPICAL_LENGTH, adapter_bytes, kv_cache_size
from server.engine.runner import Runner
from tests.tiny import CONTEXT, tiny_model, tiny_tokenizer

LAYERS = {0: (2, 16), 1: (2, 16)}
"""Keys and values of the tiny model: 256 bytes a token in float32."""
TOKEN = block_bytes(LAYERS, 1, torch.float32)
GIB = 2**30
SHAPE = {
    **{"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.fixture
def base() -> Base:
    return make_base(tiny_model(), tiny_tokenizer(), "tiny")


def room(base: Base, free: int, monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[int, str]:
    """Tokens of the KV cache, and the line about it, if ``free`` bytes are left beside the adapters."""
    settings = Settings(**{"device": "cpu", "block_size": 16, **changes})
    pool = AdapterPool(1, choose_backend(base.device, base.dtype))
    pool.install(base.model, base.layout)
    taken = adapter_bytes(pool.groups, settings, base.dtype)
    monkeypatch.setattr(machine, "free_memory", lambda device: free + taken)
    found = kv_cache_size(LAYERS, pool.groups, base, settings)
    return found.blocks * settings.block_size, found.reason


def test_the_cache_is_as_large_as_the_sequences_need(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, reason = room(base, 8 * GIB, monkeypatch)
    assert tokens == 32 * CONTEXT  # shorter than the usual length
    assert reason.startswith(f"keys and values: 4.0 MiB, {tokens} tokens (auto: 32 sequences of {CONTEXT} tokens; ")
    assert "8.0" in reason


def test_the_cache_holds_typical_lengths_and_at_least_one_context(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**SHAPE, intermediate_size=96, max_position_embeddings=4096)
    long = make_base(LlamaForCausalLM(config), tiny_tokenizer(), "tiny")
    assert room(long, 8 * GIB, monkeypatch)[0] == 32 * TYPICAL_LENGTH
    long = make_base(LlamaForCausalLM(config), tiny_tokenizer(), "tiny")
    tokens, reason = room(long, 8 * GIB, monkeypatch, max_batch_sequences=4)
    assert tokens == 4096
    assert "one context of 4096 tokens" in reason


def test_the_cache_takes_at_most_a_share_of_free_memory(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2000 * TOKEN
    tokens, reason = room(base, free, monkeypatch)
    assert tokens == int(CPU_SHARE * 2000) // 16 * 16
    assert f"{CPU_SHARE:.0%} of what base and adapters leave" in reason


def test_a_context_that_does_not_fit_is_refused_and_one_that_fits_named(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^--max-model-len: keys and values of one context of 256 tokens.*to 96, or"):
        room(base, 200 * TOKEN, monkeypatch)
    fits = make_base(tiny_model(), tiny_tokenizer(), "tiny", max_model_len=96)
    assert room(fits, 200 * TOKEN, monkeypatch)[0] == 96
    with pytest.raises(ConfigError, match="lower --max-device-adapters or --device-ranks"):
        room(make_base(tiny_model(), tiny_tokenizer(), "tiny"), -1, monkeypatch)


def test_a_given_size_must_leave_memory_for_adapters(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room(base, GIB, monkeypatch, kv_memory_gib=0.5)[0] == GIB // 2 // TOKEN
    again = make_base(tiny_model(), tiny_tokenizer(), "tiny")
    with pytest.raises(ConfigError, match=r"leave less than the .* that adapters on the device may take"):
        room(again, GIB // 2 - 1, monkeypatch, kv_memory_gib=0.5)
    again = make_base(tiny_model(), tiny_tokenizer(), "tiny")
    with pytest.raises(ConfigError, match=r"is more than the 0\.1. GiB free on this machine"):
        room(again, GIB // 8, monkeypatch, kv_memory_gib=0.5)
    again = make_base(tiny_model(), tiny_tokenizer(), "tiny")
    with pytest.raises(ConfigError, match="fewer than one context of 256; give more or lower --max-model-len"):
        room(again, GIB, monkeypatch, kv_memory_gib=100 * TOKEN / GIB)


def test_adapters_take_the_counted_bytes(base: Base) -> None:
    settings = Settings(max_device_adapters=2, max_rank=24)
    pool = AdapterPool(settings.rank_columns // 8, ReferenceBackend(base.device, base.dtype))
    pool.install(base.model, base.layout)
    for group in pool.groups:
        a = torch.zeros(1, len(group.names), 8, group.shape.inputs)
        group.lora.reserve(group.lora.pack(a, [torch.zeros(1, 8, out) for out in group.shape.outs]))
    taken = sum(mine.nbytes for group in pool.groups for mine, _ in group.lora.copy_pairs(None))
    assert adapter_bytes(pool.groups, settings, base.dtype) == taken


def test_the_checkpoint_does_not_stay_in_memory(tmp_path: Path) -> None:
    if not functional.has_avx512bf16():
        pytest.skip("weights are used as they were read")
    config = LlamaConfig(**SHAPE, intermediate_size=192, head_dim=32, max_position_embeddings=256)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    read = load_base(BaseOptions(str(tmp_path / "model"), tmp_path / "data", "cpu"))
    assert mapped(tmp_path)
    embedding = read.model.get_input_embeddings().weight.clone()
    runner = Runner(read, Settings(data_dir=tmp_path / "data", device="cpu", kv_memory_gib=0.01))
    assert not mapped(tmp_path)
    assert torch.equal(runner.base.model.get_input_embeddings().weight, embedding)


def mapped(under: Path) -> list[str]:
    """Weight files that are mapped into this process."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(under) in line and "safet" in line]
