"""Exports against PEFT's own merge of the same weights, and what is refused."""

import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adapters.errors import AdapterRejected
from bases.base import load_base
from bases.errors import BaseRejected, ConfigError
from bases.nf4 import Linear4bit, functional
from bases.options import BaseOptions
from manylora import main
from tests.adapter_folders import set_config, write_adapter
from tests.tiny import save_adapter, tiny_model, tiny_tokenizer
from training.export.export import ExportDiverges, ExportReport, Format, export
from training.export.shards import MergeOverflow, Shards

IDS = torch.arange(40)[None] * 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of all tests, so that each base is quantised once."""
    return tmp_path_factory.mktemp("export")


def tiny_base(root: Path, architecture: str) -> Path:
    """A Hugging Face folder of a tiny model."""
    folder = root / architecture
    if not folder.exists():
        tiny_model(architecture).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_adapter(root: Path, architecture: str) -> Path:
    """A strong adapter whose rank, scaling and targets differ by layer."""
    folder = root / f"{architecture}-adapter"
    if not folder.exists():
        lora: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"}
        patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"o_proj": 2}}
        save_adapter(tiny_model(architecture), folder, 1, **lora, **patterns)
    return folder


def tiny_options(root: Path, architecture: str, quantization: Literal["nf4", "none"] = "nf4") -> BaseOptions:
    return BaseOptions(str(tiny_base(root, architecture)), root / "data", "cpu", quantization, "fp32")


def export_tiny(root: Path, out: Path, architecture: str = "llama", **options: Any) -> ExportReport:
    options = {
        "adapter": tiny_adapter(root, architecture),
        "dtype": "fp32",
        "base": tiny_options(root, architecture),
    } | options
    return export(options.pop("adapter"), options.pop("base"), out, **options)


def oracle(root: Path, architecture: str, quantised: bool) -> PreTrainedModel:
    """Return PEFT's merge in float32 onto a dequantised copy of the model."""
    model = load_base(tiny_options(root, architecture, "nf4" if quantised else "none")).model
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(weight.float()), layer.bias
            model.set_submodule(name, plain)
    model.is_quantized = False
    return PeftModel.from_pretrained(model, tiny_adapter(root, architecture)).merge_and_unload(safe_merge=True)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_export_equals_pefts_merge_in_transformers(root: Path, tmp_path: Path, architecture: str, onto: str) -> None:
    """Qwen2 has biases and tied embeddings, Phi-3 fused projections."""
    export_tiny(root, tmp_path / "out", architecture, onto=onto)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = oracle(root, architecture, onto == "dequantized")
    other = oracle(root, architecture, onto == "original")
    assert (logits(written) - logits(expected)).abs().max() < 1e-3
    assert (logits(written) - logits(other)).abs().max() > 0.1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (not written.config.tie_word_embeddings)
    assert ("model.layers.0.self_attn.q_proj.bias" in tensors) == (architecture == "qwen2")


def test_libraries_print_nothing(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither progress bars nor warnings."""
    export_tiny(root, tmp_path / "before")
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's warning is ignored only in other tests
        export_tiny(root, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_each_slow_step_is_reported(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    export_tiny(root, tmp_path / "out", onto="original", max_shard_bytes=100_000, say=said.append)
    told = "\n".join(said)
    steps = (
        "loading llama", "answers of base and adapter, unmerged: 0 of 12", "loading the original weights",
        "answers of base and adapter, unmerged: 12 of 12", "merging and writing fp32 weights: 0 bytes of ",
        "wrote weights file 1", "wrote weights file 2", "reading the export back",
        "answers of the export: 6 of 6",
    )  # fmt: skip
    places = [told.index(step) for step in steps]
    assert places[0] < places[1] < places[2] < places[4] < places[5] < places[6] < places[7] < places[8]
    size = next(line for line in said if line.startswith("merging and writing") and ": 0 bytes of" not in line)
    assert size.partition(": ")[2].split(" of ")[0] == size.split(" of ")[1], "all of it was counted"


def test_file_modes_follow_the_umask(root: Path, tmp_path: Path) -> None:
    """safetensors creates files that only their owner can read."""
    before = os.umask(0o027)
    try:
        export_tiny(root, tmp_path / "out", max_shard_bytes=100_000)
    finally:
        os.umask(before)
    files = list((tmp_path / "out").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
    assert sum(file.suffix == ".safetensors" for file in files) > 1
    cached = [file for file in (root / "data" / "bases").glob("*/*") if file.is_file()]
    assert len({stat.S_IMODE(file.stat().st_mode) for file in cached}) == 1


def test_the_two_targets_differ_and_the_report_says_so(root: Path, tmp_path: Path) -> None:
    trained = export_tiny(root, tmp_path / "trained")
    original = export_tiny(root, tmp_path / "original", onto="original")
    assert trained.from_trained == trained.divergence
    assert trained.divergence.mean_kl < 1e-5
    assert original.divergence.mean_kl < 1e-5
    assert original.from_trained.mean_kl > 0.01
    assert "this second divergence is expected" in "\n".join(original.lines())
    assert "expected" not in "\n".join(trained.lines())


def test_export_folder_has_tokenizer_and_configs(root: Path, tmp_path: Path) -> None:
    report = export_tiny(root, tmp_path / "out", dtype="bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_tokenizer().chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file()
    kept = json.loads((tmp_path / "out" / "manylora.json").read_text())
    assert kept["divergence"]["mean_kl"] == report.divergence.mean_kl
    assert kept["adapter"] == report.adapter


def test_shards_hold_at_most_their_limit(root: Path, tmp_path: Path) -> None:
    limit = 100_000
    export_tiny(root, tmp_path / "shards", max_shard_bytes=limit)
    export_tiny(root, tmp_path / "one")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        with safe_open(file, "pt") as opened:
            assert sum(opened.get_tensor(key).nbytes for key in opened.keys()) <= limit  # noqa: SIM118
    one, many = Shards(tmp_path / "one"), Shards(tmp_path / "shards")
    assert one.shapes == many.shapes
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.shapes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32)
    assert torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one")))


def test_a_base_alone_can_be_exported(root: Path, tmp_path: Path) -> None:
    report = export_tiny(root, tmp_path / "out", adapter=None)
    assert report.adapter is None
    assert report.divergence.mean_kl < 1e-5


def test_an_unquantised_base_is_merged_onto_its_own_weights(root: Path, tmp_path: Path) -> None:
    report = export_tiny(root, tmp_path / "out", base=tiny_options(root, "llama", "none"))
    assert report.divergence.mean_kl < 1e-5
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(written) - logits(oracle(root, "llama", quantised=False))).abs().max() < 1e-3


def test_the_adapters_own_chat_template_is_the_exports(root: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_model(), tmp_path / "adapter", 1, target_modules=["q_proj"])
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (adapter / "chat_template.jinja").write_text(template)
    export_tiny(root, tmp_path / "out", adapter=adapter)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def spoiler(out: Path, change: Callable[[dict[str, Tensor]], None]) -> Callable[[str], None]:
    """Change the weights after they were written, as a bad disk or a wrong merge would."""

    def say(line: str) -> None:
        if line.startswith("reading the export back"):
            (file,) = out.parent.glob(f".{out.name}-*/{out.name}/model.safetensors")
            tensors = load_file(file)
            change(tensors)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})

    return say


def unmerge_one_layer(root: Path, tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = Shards(tiny_base(root, "llama")).read(name).to(tensors[name])


def swap_rows(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].flip(0)


def spoil_with_nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][0] = torch.nan


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("change", ["unmerged", "rows", "nan"])
def test_diverging_export_fails(root: Path, tmp_path: Path, change: str, dtype: str) -> None:
    changes: dict[str, Callable[[dict[str, Tensor]], None]] = {
        "unmerged": lambda tensors: unmerge_one_layer(root, tensors),
        "rows": swap_rows,
        "nan": spoil_with_nan,
    }
    out = tmp_path / "out"
    with pytest.raises(ExportDiverges, match=r"the merged model differs from base \+ adapter: KL") as refusal:
        export_tiny(root, out, dtype=dtype, onto="original", say=spoiler(out, changes[change]))
    assert refusal.value.divergence
    assert list(tmp_path.iterdir()) == []


def test_failed_export_is_kept_under_another_name(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportDiverges, match=r"it is in .*out\.failed"):
        export_tiny(root, out, keep_failed=True, say=spoiler(out, swap_rows))
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_an_adapter_with_unknown_fields_is_refused_unless_allowed(root: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_model(), tmp_path / "adapter", 1, target_modules=["q_proj"])
    set_config(adapter, shift=0.5)
    with pytest.raises(AdapterRejected, match="shift: is not known"):
        export_tiny(root, tmp_path / "out", adapter=adapter)
    export_tiny(root, tmp_path / "out", adapter=adapter, allow_unknown_fields=True)


def test_another_bases_adapter_is_refused_unless_allowed(root: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_model(), tmp_path / "adapter", 1, target_modules=["q_proj"])
    (adapter / "manylora.json").write_text(json.dumps({"base_fingerprint": "f" * 64}))
    with pytest.raises(AdapterRejected, match="was trained on the base ffff"):
        export_tiny(root, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()
    export_tiny(root, tmp_path / "out", adapter=adapter, allow_base_mismatch=True)


def test_weights_that_overflow_the_dtype_are_refused(root: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(MergeOverflow, match=r"model\.layers\.1\.mlp\.up_proj\.weight overflows float16"):
        export(None, BaseOptions(str(tmp_path / "base"), root, quantization="none"), tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"onto": "nf4"}, "--onto: must be one of dequantized, original"),
        ({"dtype": "int8"}, "--dtype: must be one of bf16, fp16, fp32"),
        ({"format": "onnx"}, "--format: must be one of safetensors, gguf"),
        ({"max_shard_bytes": 0}, "--max-shard-gib"),
    ],
)
def test_option_errors(root: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        export_tiny(root, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_not_overwritten(root: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        export_tiny(root, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BaseRejected, match="cannot be read"):
        Shards(tmp_path)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_the_demo_model(root: Path, tmp_path: Path, format: Format) -> None:
    """Seen: KL 0.0003 to 0.0005 from rounding to bfloat16, and every greedy token or nearly every one the same."""
    base = BaseOptions("demo", root / "data")
    layout = load_base(base).layout
    adapter = write_adapter(tmp_path / "adapter", layout, rank=16, layers=tuple(layout.linears), lora_alpha=0.07)
    report = export(adapter, base, tmp_path / "out", format=format)
    assert report.effect
    assert 0.1 < report.effect.mean_kl < 5
    assert report.divergence.mean_kl < 0.001
    assert report.divergence.greedy > 0.8 * report.divergence.greedy_of


@pytest.mark.parametrize(
    "said", ["[]", '{"base": {}}', '{"base": []}', '{"quantization": []}', '{"base": 1, "base": 2}', "{"]
)
def test_manifest_without_a_base_is_refused(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "manylora.json").write_text(said)
    assert main(["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) != 0
    assert "manylora.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
