"""verify: adapters of PEFT are accepted with PEFT's meaning; every defect is refused by name."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters.errors import AdapterRejected
from adapters.format.content import content_id
from adapters.format.peft_config import LoraConfig
from adapters.format.spec import BaseLayout
from adapters.format.verify import verify
from adapters.format.weights import read_weights
from tests.adapter_folders import (
    CONFIG,
    DEFECTS,
    FINGERPRINT,
    KEY_A,
    LAYERS,
    ORIGIN,
    WEIGHTS,
    layout_of,
    set_config,
    set_tensors,
    write_adapter,
)
from tests.tiny import adapter_variants, save_adapter, tiny_model

MAX_RANK = 16

MORE_VARIANTS = {
    "pattern_targets": {"r": 2, "target_modules": r".*layers\.1\.(self_attn\.[qo]\w*|mlp\.down)_proj"},
    "excluded": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.down_proj"]},
    "layers_pattern": {
        "r": 2,
        "target_modules": ["o_proj", "model.layers.0.mlp.down_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "rslora_patterns": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["o_proj", "down_proj"],
        "rank_pattern": {r".*\.0\..*": 7, "down_proj": 2},
        "alpha_pattern": {r"self_attn\.o_proj": 9, "^model.layers.1.*": 1.5},
    },
    "gaussian": {"r": 4, "target_modules": ["o_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    return layout_of(tiny_model("llama"))


@pytest.fixture
def folder(tmp_path: Path, layout: BaseLayout) -> Path:
    return write_adapter(tmp_path / "adapter", layout)


@pytest.mark.parametrize("variant", [*adapter_variants("llama"), *MORE_VARIANTS])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_reads_an_adapter_as_peft_does(architecture: str, variant: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    lora = {**adapter_variants(architecture), **MORE_VARIANTS}[variant]
    folder = save_adapter(model, tmp_path, seed=1, **lora)
    spec = verify(folder, layout_of(model), 256)
    weights = read_weights(folder, spec)

    peft = PeftModel.from_pretrained(tiny_model(architecture), folder)
    oracle = {
        name.removeprefix("base_model.model."): module
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert set(spec.targets) == set(oracle)
    assert set(weights.tensors) == set(oracle)
    for layer, module in oracle.items():
        assert spec.targets[layer].scaling == module.scaling["default"]
        assert spec.targets[layer].rank == module.r["default"]
        a, b = weights.tensors[layer]
        assert torch.equal(a, module.lora_A["default"].weight)
        assert torch.equal(b, module.lora_B["default"].weight)
    assert spec.rank == max(module.r["default"] for module in oracle.values())
    assert spec.size_bytes == (folder / WEIGHTS).stat().st_size


NAMES = ["q_proj", "proj", "self_attn.o_proj", "mlp", "model.layers.1.mlp.up_proj", "layers.0.mlp.up_proj", "k_proj"]
PATTERNS = [
    "q_proj",
    r".*_proj",
    r"layers\.1\..*",
    r"^model\.layers\.0.*",
    r"model.layers.0.self_attn.q_proj",
    "up|down_proj",
]
numbers = st.integers(1, 9)
CONTAINERS = [
    *("layers", "blocks", [], ["blocks", "layers"], ["blocks"]),
    # An alternative that matches without an index ends the search.
    *("model|layers", ["model.*|layers", "layers"], ["model|blocks", "layers"]),
]


@settings(max_examples=300, deadline=None)
@given(
    target_modules=st.lists(st.sampled_from(NAMES), min_size=1) | st.sampled_from(PATTERNS),
    exclude_modules=st.none() | st.lists(st.sampled_from(NAMES), max_size=2) | st.sampled_from(PATTERNS),
    layers_to_transform=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
    layers_pattern=st.none() | st.sampled_from(CONTAINERS),
    rank_pattern=st.dictionaries(st.sampled_from(PATTERNS), numbers, max_size=3),
    alpha_pattern=st.dictionaries(st.sampled_from(PATTERNS), numbers, max_size=3),
)
def test_targets_ranks_and_scaling_equal_pefts(layout: BaseLayout, **fields: object) -> None:
    if isinstance(fields["target_modules"], str) or fields["layers_to_transform"] is None:
        fields |= {"layers_to_transform": None, "layers_pattern": None}
    bare = BaseLayout(layout.fingerprint, layout.linears)
    ours = LoraConfig.model_validate({"r": 8, "lora_alpha": 16, **fields}).targets(bare)

    peft = PeftLoraConfig(r=8, lora_alpha=16, **fields)
    theirs = {}
    for layer in layout.linears:
        if check_target_module_exists(peft, layer):
            rank = peft.rank_pattern.get(get_pattern_key(peft.rank_pattern, layer), peft.r)
            alpha = peft.alpha_pattern.get(get_pattern_key(peft.alpha_pattern, layer), peft.lora_alpha)
            theirs[layer] = (rank, alpha / rank)
    assert {layer: (target.rank, target.scaling) for layer, target in ours.items()} == theirs


def test_a_good_folder_is_accepted(folder: Path, layout: BaseLayout) -> None:
    """Otherwise every defect below might be refused because of the helper that writes the folder."""
    spec = verify(folder, layout, MAX_RANK)
    assert set(spec.targets) == set(LAYERS)
    assert spec.base_fingerprint is None


@pytest.mark.parametrize("name", DEFECTS)
def test_refuses_by_name(name: str, folder: Path, layout: BaseLayout) -> None:
    defect = DEFECTS[name]
    defect.spoil(folder)
    with pytest.raises(AdapterRejected) as caught:
        verify(folder, layout, MAX_RANK)
    assert defect.reason in caught.value.reason
    assert caught.value.file == defect.file
    assert defect.tensor in (None, caught.value.tensor)
    assert str(folder.parent) not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path, layout: BaseLayout) -> None:
    with pytest.raises(AdapterRejected, match="nowhere: is not a folder"):
        verify(tmp_path / "nowhere", layout, MAX_RANK)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_empty_unknown_field_is_accepted(value: object, folder: Path, layout: BaseLayout) -> None:
    set_config(folder, use_next_year=value)
    verify(folder, layout, MAX_RANK)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_base_preserving_initialisations_are_accepted(init: object, folder: Path, layout: BaseLayout) -> None:
    set_config(folder, init_lora_weights=init)
    verify(folder, layout, MAX_RANK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeps_the_dtype_and_reads_keys_with_the_adapter_name(
    dtype: torch.dtype, folder: Path, layout: BaseLayout
) -> None:
    matrix = torch.randn(4, 64).to(dtype)
    set_tensors(folder, {KEY_A: None, KEY_A.replace("lora_A", "lora_A.default"): matrix})
    weights = read_weights(folder, verify(folder, layout, MAX_RANK))
    assert weights.tensors[LAYERS[0]][0].dtype == dtype
    assert torch.equal(weights.tensors[LAYERS[0]][0], matrix)


def test_one_layer_with_an_update_is_enough(folder: Path, layout: BaseLayout) -> None:
    set_tensors(folder, {KEY_A: torch.zeros(4, 64)})
    verify(folder, layout, MAX_RANK)


def test_names_the_base_it_was_trained_on(folder: Path, layout: BaseLayout) -> None:
    (folder / ORIGIN).write_text(json.dumps({"base_fingerprint": FINGERPRINT, "steps": 24}))
    assert verify(folder, layout, MAX_RANK).base_fingerprint == FINGERPRINT


def test_weights_changed_after_training_are_refused(folder: Path, layout: BaseLayout) -> None:
    weights = (folder / WEIGHTS).read_bytes()
    (folder / ORIGIN).write_text(json.dumps({"weights_sha256": hashlib.sha256(weights).hexdigest()}))
    verify(folder, layout, MAX_RANK)
    set_tensors(folder, {KEY_A: torch.ones(4, 64)})
    with pytest.raises(AdapterRejected, match=rf"^{WEIGHTS}: was changed after training: its SHA-256 is "):
        verify(folder, layout, MAX_RANK)


def test_files_may_be_links_as_in_a_hub_cache(folder: Path, tmp_path: Path, layout: BaseLayout) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(folder / name)
    assert verify(linked, layout, MAX_RANK) == verify(folder, layout, MAX_RANK)


def test_the_id_is_the_content(folder: Path, layout: BaseLayout) -> None:
    ids = [content_id(folder)]
    (folder / "README.md").write_text("not part of the content")
    assert content_id(folder) == ids[0]
    (folder / ORIGIN).write_text("{}")
    ids.append(content_id(folder))
    set_config(folder, lora_alpha=3)
    ids.append(content_id(folder))
    set_tensors(folder, {KEY_A: torch.ones(4, 64)})
    ids.append(content_id(folder))
    assert len(set(ids)) == 4
    assert verify(folder, layout, MAX_RANK).id == ids[-1]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_only_adapter_rejected(data: st.DataObject, folder: Path, layout: BaseLayout) -> None:
    """Random byte changes in header or config give a spec or AdapterRejected, no other error."""
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    good = (folder / name).read_bytes()
    damaged = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, min(len(good), 600) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789[]{},:"- '))
    cut = data.draw(st.none() | st.integers(0, len(good)))
    (folder / name).write_bytes(bytes(damaged[:cut]))
    with suppress(AdapterRejected):
        verify(folder, layout, MAX_RANK)
    (folder / name).write_bytes(good)
