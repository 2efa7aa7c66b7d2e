"""The fingerprint of a base: what it depends on, and that it is the same wherever the base was quantised."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapters.errors import AdapterRejected
from adapters.format.verify import verify
from bases.base import Base, load_base, make_base
from bases.double_quant import code_table
from bases.fingerprint import Identity, identify
from bases.nf4 import Linear4bit
from bases.options import BaseOptions
from tests.adapter_folders import write_adapter
from tests.tiny import tiny_model, tiny_tokenizer

DEMO = "110caadad6ed77a4839c7841a43330856d371310d20c01d0742c35c57e183b79"
"""The demo model's fingerprint on x86 with AVX2. It must never change: adapters name it."""
QUANTISE = """
import sys, torch
from pathlib import Path
from bases.base import load_base
from bases.options import BaseOptions

model, data, threads, *dtypes = sys.argv[1:]
torch.set_num_threads(int(threads))
for dtype in dtypes:
    print(load_base(BaseOptions(model=model, data_dir=Path(data), device="cpu", dtype=dtype)).layout.fingerprint)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(BaseOptions(model=str(folder), data_dir=folder.parent / "data", device="cpu"))


def elsewhere(model: str, data: Path, *dtypes: str, capability: str, threads: int) -> list[str]:
    """Return the fingerprints computed in another process with this vector width of torch."""
    command = [sys.executable, "-c", QUANTISE, model, str(data), str(threads), *dtypes]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def with_table(base: Base, *, fused: bool) -> Identity:
    """Return the fingerprint of the base with this rounding of the code table."""
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    kept = [layer.weight.quant_state.state2.code for layer in layers]
    try:
        for layer in layers:
            layer.weight.quant_state.state2.code = code_table(fused=fused)
        return identify(base.model, base.tokenizer)
    finally:
        for layer, table in zip(layers, kept, strict=True):
            layer.weight.quant_state.state2.code = table


def test_fingerprint_does_not_depend_on_vector_width_or_threads(folder: Path, tmp_path: Path) -> None:
    narrow = elsewhere(str(folder), tmp_path / "narrow", "bf16", "fp32", capability="default", threads=1)
    wide = elsewhere(str(folder), tmp_path / "wide", "bf16", "fp32", capability="avx2", threads=2)
    assert len(set(narrow)) == 2
    assert narrow == wide


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize(("capability", "threads"), [("default", 1), ("avx2", 2)])
def test_fingerprint_of_the_demo_has_not_changed(tmp_path: Path, capability: str, threads: int) -> None:
    assert elsewhere("demo", tmp_path, "bf16", capability=capability, threads=threads) == [DEMO]


def test_differently_rounded_base_is_equivalent(base: Base, tmp_path: Path) -> None:
    """Adapters work on both: today's quantisation, and old data folders of processors without FMA."""
    old = with_table(base, fused=False)
    assert old.fingerprint != base.layout.fingerprint
    assert old.equivalents == {base.layout.fingerprint}
    assert base.layout.equivalents == {old.fingerprint}
    assert old.parts == base.layout.parts
    folder = write_adapter(tmp_path / "adapter", base.layout)
    (folder / "manylora.json").write_text(f'{{"base_fingerprint": "{old.fingerprint}"}}')
    assert verify(folder, base.layout, 64).base_fingerprint == old.fingerprint
    (folder / "manylora.json").write_text(f'{{"base_fingerprint": "{"0" * 64}"}}')
    with pytest.raises(AdapterRejected, match="was trained on the base 0000"):
        verify(folder, base.layout, 64)


def test_another_table_has_no_equivalents(base: Base) -> None:
    layer = next(module for module in base.model.modules() if isinstance(module, Linear4bit))
    table = layer.weight.quant_state.state2.code
    layer.weight.quant_state.state2.code = table * 2
    changed = identify(base.model, base.tokenizer)
    layer.weight.quant_state.state2.code = table
    assert changed.equivalents == frozenset()
    assert changed.fingerprint not in {base.layout.fingerprint, *base.layout.equivalents}


def test_fingerprint_parts_are_weights_tokenizer_and_template() -> None:
    plain = identify(tiny_model(), tiny_tokenizer())
    assert identify(tiny_model(), tiny_tokenizer()) == plain
    assert plain.equivalents == frozenset()
    assert plain.parts["quantization"] == "none, float32"

    nudged = tiny_model()
    nudged.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    other_template, other_tokens = tiny_tokenizer(), tiny_tokenizer()
    other_template.chat_template += " "
    other_tokens.add_tokens(["<|new|>"])
    changed = {
        ("weights",): identify(nudged, tiny_tokenizer()),
        ("weights", "quantization"): identify(tiny_model().bfloat16(), tiny_tokenizer()),
        ("chat_template",): identify(tiny_model(), other_template),
        ("tokenizer",): identify(tiny_model(), other_tokens),
    }
    assert len({plain.fingerprint, *(each.fingerprint for each in changed.values())}) == 5
    for parts, each in changed.items():
        assert tuple(part for part in plain.parts if plain.parts[part] != each.parts[part]) == parts


def test_a_base_carries_its_parts(base: Base) -> None:
    assert base.layout.parts["quantization"] == "nf4 with double quantisation, bfloat16"
    plain = make_base(tiny_model().bfloat16(), tiny_tokenizer(), "tiny")
    different = {part for part, value in plain.layout.parts.items() if base.layout.parts[part] != value}
    assert different == {"weights", "quantization"}
    assert torch.equal(plain.model.model.norm.weight, base.model.model.norm.weight)
