"""The base: what is refused and why, what its fingerprint depends on, and the demo model quantised and cached."""

import copy
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from bases.architecture import check_architecture
from bases.base import Base, fetch_base, load_base, make_base
from bases.errors import BaseRejected, ConfigError
from bases.model_source import find_source
from bases.nf4 import Linear4bit
from server.config import Settings
from tests.tiny import ARCHITECTURES, CONTEXT, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as a Hugging Face folder."""
    tiny_model("llama").save_pretrained(tmp_path / "tiny-llama")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def settings(tmp_path: Path, model: Path | str = "demo", **more: object) -> Settings:
    return Settings(model=str(model), data_dir=tmp_path / "data", device="cpu", **more)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_that_are_served(architecture: str) -> None:
    model = tiny_model(architecture)
    base = make_base(model, tiny_tokenizer(), "tiny")
    assert base.layout.linears.keys() == {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert base.layout.unserved.keys() == {"lm_head", "model.embed_tokens"}
    assert base.max_model_len == CONTEXT
    assert base.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_check_architecture_does_not_change_the_model() -> None:
    model = tiny_model("gemma2")
    before = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
    make_base(model, tiny_tokenizer(), "tiny")
    assert (model.config.to_dict(), model.config._attn_implementation) == before


def test_a_base_that_was_fetched_is_not_made_again(tmp_path: Path, folder: Path) -> None:
    said: list[str] = []
    fetched = fetch_base(settings(tmp_path, folder).base, said.append)
    assert fetched.is_relative_to(tmp_path / "data")
    before = len(said)
    assert before
    assert fetch_base(settings(tmp_path, folder).base, said.append) == fetched
    assert len(said) == before, "it is not made again"
    load_base(settings(tmp_path, folder).base, said.append)
    assert said[before:] == [f"loading tiny-llama from {fetched}"]


def shrunk(kind: str, **more: object) -> PreTrainedConfig:
    """Return a small default config of this architecture."""
    small = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    return CONFIG_MAPPING[kind](**{**small, **more})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: shrunk("t5"), "it is an encoder-decoder model"),
        (lambda: CONFIG_MAPPING["llava"](), "it is multimodal"),
        (lambda: shrunk("clip_text_model"), r"type \(clip_text_model\) are not causal language models"),
        (lambda: shrunk("vit"), r"type \(vit\) are not causal language models"),
        (
            lambda: shrunk("mixtral", num_key_value_heads=4),
            r"^mixtures of experts are not served \(its config has num_local_experts: 8\)$",
        ),
        (lambda: shrunk("qwen2_moe", num_key_value_heads=4), "mixtures of experts are not served"),
        (lambda: shrunk("deepseek_v3", num_key_value_heads=4), "mixtures of experts are not served"),
        (lambda: shrunk("gpt_oss", num_key_value_heads=4), "mixtures of experts are not served"),
        (lambda: shrunk("jamba", num_key_value_heads=4), "mixtures of experts are not served"),
        (lambda: shrunk("gpt2"), r"GPT-2's transposed layers \(Conv1D\) instead of linear layers, which is not served"),
        (lambda: shrunk("mamba"), "layers that carry a state from token to token"),
        (lambda: shrunk("mamba2", num_heads=4, head_dim=32), "layers that carry a state from token to token"),
        (lambda: shrunk("bloom"), "it takes no `position_ids`, so requests cannot share a batch"),
        (lambda: shrunk("mpt"), "it takes no `position_ids`, so requests cannot share a batch"),
        (lambda: shrunk("falcon"), "a layer computes its attention with its own code"),
        (lambda: shrunk("gptj"), "needs more than the shapes of its tensors"),
        (lambda: shrunk("bert", is_decoder=False), "its tokens attend to later ones, as in BERT"),
        (lambda: shrunk("granite_swa", num_key_value_heads=4), r"`s_aux` \(attention sinks\), which is not served"),
        (lambda: shrunk("gemma4_text", num_key_value_heads=4), "its keys and values differ in shape"),
        (lambda: shrunk("llama", num_key_value_heads=3), "4 query heads cannot share 3 key heads evenly"),
        (lambda: shrunk("phi3", num_key_value_heads=4), "cannot build the model that its config.json describes"),
        (
            lambda: shrunk("lfm2", num_key_value_heads=4, layer_types=["conv"] * 4),
            r"it has a convolution \(.*conv.weight\), which is not served",
        ),
        (lambda: shrunk("stablelm", num_key_value_heads=4), "a layer computes its attention with its own code"),
        (
            lambda: shrunk("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            r"its rotary embedding \(dynamic\) may depend on the other requests",
        ),
    ],
)
def test_architectures_that_are_refused(config: Callable[[], PreTrainedConfig], reason: str) -> None:
    with pytest.raises(BaseRejected, match=reason):
        check_architecture(config())


def test_longrope_is_served_up_to_its_original_context() -> None:
    model = tiny_model("phi3")
    widths = [1.0] * 8
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": widths,
        "long_factor": widths,
        "original_max_position_embeddings": CONTEXT // 2,
        "factor": 2.0,
    }
    with pytest.raises(BaseRejected, match=f"--max-model-len {CONTEXT // 2} or less"):
        make_base(model, tiny_tokenizer(), "tiny")
    assert make_base(model, tiny_tokenizer(), "tiny", max_model_len=CONTEXT // 2).max_model_len == CONTEXT // 2


def test_a_longer_context_than_the_model_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"--max-model-len: must be at most {CONTEXT}.*\(got {CONTEXT + 1}\)"):
        make_base(tiny_model(), tiny_tokenizer(), "tiny", max_model_len=CONTEXT + 1)


def test_eos_tokens_of_config_generation_config_and_tokenizer() -> None:
    model = tiny_model()
    model.config.eos_token_id = 5
    model.generation_config.eos_token_id = [6, 7]
    assert make_base(model, tiny_tokenizer(), "tiny").eos_token_ids == {5, 6, 7, tiny_tokenizer().eos_token_id}


def test_a_folder_is_quantised_once(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = load_base(settings(tmp_path, folder).base, said.append)
    second = load_base(settings(tmp_path, folder).base, said.append)
    assert sum("quantising" in line for line in said) == 1
    assert first.name == "tiny-llama"
    assert first.layout == second.layout
    assert all(isinstance(second.model.get_submodule(name), Linear4bit) for name in second.layout.linears)
    assert not isinstance(second.model.lm_head, Linear4bit)
    assert [path.name for path in (tmp_path / "data" / "bases").glob("tmp-*")] == []


def test_a_changed_source_is_quantised_anew(folder: Path, tmp_path: Path) -> None:
    first = load_base(settings(tmp_path, folder).base)
    tiny_model("llama", seed=1).save_pretrained(folder)
    assert load_base(settings(tmp_path, folder).base).layout.fingerprint != first.layout.fingerprint


def test_unquantised_weights_are_not_copied(folder: Path, tmp_path: Path) -> None:
    base = load_base(settings(tmp_path, folder, quantization="none", dtype="fp32").base)
    original = tiny_model("llama").state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base.model.state_dict().items())
    assert base.dtype == torch.float32
    assert not (tmp_path / "data").exists()


def test_a_damaged_cache_is_refused(folder: Path, tmp_path: Path) -> None:
    load_base(settings(tmp_path, folder).base)
    (weights,) = (tmp_path / "data").rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BaseRejected, match="damaged; delete that folder"):
        load_base(settings(tmp_path, folder).base)


def test_a_missing_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BaseRejected, match="its weights do not match its config: missing_keys"):
        load_base(settings(tmp_path, folder).base)
    assert [path for path in (tmp_path / "data" / "bases").iterdir() if path.is_dir()] == []


def test_an_already_quantised_model_is_refused(folder: Path, tmp_path: Path) -> None:
    load_base(settings(tmp_path, folder).base)
    (cached,) = (path.parent for path in (tmp_path / "data").rglob("model.safetensors"))
    with pytest.raises(BaseRejected, match="already quantised"):
        load_base(settings(tmp_path, cached).base)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "no folder or file '/no/such/folder', and it is not a hub id"),
        ("nix", "no folder or file 'nix', and it is not a hub id"),
        ("{tmp}", "has no config.json"),
        ("{tmp}/gguf", r"has no config.json, .*; for the GGUF file in it give --model .*/gguf/small.gguf"),
        ("{tmp}/adapter", r"/adapter holds an adapter .*manylora adapters push .*/adapter$"),
        ("{tmp}/weights.bin", "neither a folder nor a .gguf file"),
    ],
)
def test_missing_model(tmp_path: Path, model: str, message: str) -> None:
    for name in ("weights.bin", "gguf/small.gguf", "adapter/adapter_config.json", "adapter/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        find_source(model.format(tmp=tmp_path))


def test_a_broken_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(BaseRejected, match=r"broken\.gguf is not a GGUF file, or is damaged or incomplete \(68 bytes"):
        load_base(settings(tmp_path, tmp_path / "broken.gguf").base)


@dataclass(frozen=True)
class Demo:
    first: Base
    second: Base
    said: list[str]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The demo model quantised in a new data folder, and loaded a second time."""
    data = tmp_path_factory.mktemp("demo")
    said: list[str] = []
    yield Demo(load_base(settings(data).base, said.append), load_base(settings(data).base, said.append), said)
    gc.collect()


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all tensors with quantisation state; shared ones count once."""
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(tensors.values())


@pytest.mark.demo
def test_the_demo_base(demo: Demo) -> None:
    assert demo.first.layout == demo.second.layout
    assert [line.split()[0] for line in demo.said] == ["unpacking", "quantising", "loading", "loading"]
    base = demo.second
    assert base.name == "smollm2-135m-instruct"
    assert len(base.layout.linears) == 30 * 7
    assert base.eos_token_ids == {2}
    assert base.max_model_len == 8192
    assert base.dtype == torch.bfloat16
    assert base.tokenizer.chat_template
    # On x86 with AVX2, and elsewhere. They must never change: adapters name them.
    assert base.layout.fingerprint == "110caadad6ed77a4839c7841a43330856d371310d20c01d0742c35c57e183b79"
    assert base.layout.equivalents == {"201f04e3ee0a76942126972054645dbabbdac12492085e77058b936d4f66c5cd"}


@pytest.mark.demo
def test_the_demo_base_is_small_and_tied(demo: Demo) -> None:
    model = demo.second.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weight_bytes(model) < 130e6


@pytest.mark.demo
def test_loading_the_demo_base_takes_its_size_in_memory(demo: Demo, tmp_path: Path) -> None:
    gc.collect()
    before = psutil.Process().memory_info().rss
    data = next(Path(line.partition(" from ")[2]).parent.parent for line in demo.said if "loading" in line)
    base = load_base(Settings(data_dir=data, device="cpu").base)
    grown = psutil.Process().memory_info().rss - before
    assert weight_bytes(base.model) < 130e6
    assert grown < 160e6
