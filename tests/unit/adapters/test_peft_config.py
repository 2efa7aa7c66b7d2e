"""Fields of ``adapter_config.json``: all of PEFT's are classified; unknown ones are accepted only on request."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model

from adapters.errors import AdapterRejected
from adapters.format.peft_config import _NO_EFFECT_FIELDS, _UNSUPPORTED_FIELDS, LoraConfig
from adapters.format.spec import BaseLayout
from adapters.format.verify import read_spec, verify
from adapters.format.weights import read_weights
from tests.adapter_folders import CONFIG, DEFECTS, layout_of, set_config, write_adapter
from tests.tiny import save_adapter, tiny_model

MAX_RANK = 16
TWO_KINDS = {"bias", "init_lora_weights"}
"""Some of their values are served, others are not."""


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    return layout_of(tiny_model())


@pytest.fixture
def folder(tmp_path: Path, layout: BaseLayout) -> Path:
    return write_adapter(tmp_path / "adapter", layout)


def test_every_field_of_peft_is_classified_once() -> None:
    """Fails if a release of PEFT adds a field, or drops one that is not in ``PAST``."""
    decided = [*_NO_EFFECT_FIELDS, *_UNSUPPORTED_FIELDS, *LoraConfig.model_fields, *TWO_KINDS]
    assert len(set(decided)) == len(decided)
    theirs = {field.name for field in dataclasses.fields(PeftLoraConfig)}
    assert theirs - set(decided) == set(), "decide whether these change the output, in adapters/format/peft_config.py"
    assert set(decided) - theirs == PAST


PAST = {
    # PEFT 0.1 and 0.2
    *("enable_lora", "merge_weights"),
    # ms-swift
    *("swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "use_qa_lora", "use_merged_linear"),
    "model_key_mapping",
    # Axolotl
    "nvfp4_merge_aware",
}
"""Fields that the installed PEFT does not have."""


def test_default_peft_config_has_no_unknown_field(tmp_path: Path) -> None:
    PeftLoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert LoraConfig.model_validate(json.loads((tmp_path / CONFIG).read_text())).unknown == ()


TOOLS: dict[str, dict[str, Any]] = {
    "PEFT 0.2": {"enable_lora": None, "merge_weights": False},
    "ms-swift": {
        "swift_type": "LORA",
        "lora_dtype": "bfloat16",
        "lorap_lr_ratio": 16.0,
        "lorap_emb_lr": 1e-6,
        "use_qa_lora": False,
        "use_merged_linear": False,
        "model_key_mapping": None,
    },
    "Axolotl": {
        "fan_in_fan_out": True,
        "nvfp4_merge_aware": {
            "scale_mode": "fresh",
            "pts_policy": "base_fused_max",
            "encoder": None,
            "start_step": None,
        },
    },
    "Unsloth": {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True}},
}
"""Fields that these tools write besides those of the installed PEFT."""


@pytest.mark.parametrize("tool", TOOLS)
def test_fields_of_other_trainers_change_nothing(tool: str, folder: Path, layout: BaseLayout) -> None:
    plain = verify(folder, layout, MAX_RANK)
    set_config(folder, **TOOLS[tool])
    spec = verify(folder, layout, MAX_RANK)
    assert (spec.targets, spec.unknown_fields) == (plain.targets, ())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module:UserWarning")
def test_peft_does_not_look_at_fan_in_fan_out_of_linear_layers(tmp_path: Path) -> None:
    folder = save_adapter(tiny_model(), tmp_path, seed=0, r=4, target_modules=["q_proj", "down_proj"])
    tokens = torch.arange(40)[None]
    plain = PeftModel.from_pretrained(tiny_model(), folder)(tokens).logits
    set_config(folder, fan_in_fan_out=True)
    assert torch.equal(PeftModel.from_pretrained(tiny_model(), folder)(tokens).logits, plain)
    verify(folder, layout_of(tiny_model()), MAX_RANK)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_config_with_biases_is_accepted_if_the_weights_have_none(bias: str, tmp_path: Path) -> None:
    """As PEFT writes them for a base without biases."""
    model = tiny_model()
    folder = save_adapter(model, tmp_path, seed=0, r=4, target_modules=["q_proj", "down_proj"], bias=bias)
    assert json.loads((folder / CONFIG).read_text())["bias"] == bias
    weights = read_weights(folder, verify(folder, layout_of(model), MAX_RANK))
    peft = PeftModel.from_pretrained(tiny_model(), folder)
    module = peft.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert torch.equal(weights.tensors["model.layers.0.self_attn.q_proj"][1], module.lora_B["default"].weight)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused_by_name(bias: str, tmp_path: Path) -> None:
    """As PEFT writes them for a base that has some."""
    model = tiny_model("qwen2")
    get_peft_model(model, PeftLoraConfig(r=4, target_modules=["q_proj"], bias=bias)).save_pretrained(tmp_path)
    with pytest.raises(AdapterRejected, match="trained biases are not served; train with bias: none") as caught:
        verify(tmp_path, layout_of(tiny_model("qwen2")), MAX_RANK)
    assert caught.value.tensor is not None
    assert caught.value.tensor.endswith("q_proj.base_layer.bias") or caught.value.tensor.endswith("_proj.bias")


def test_unknown_fields_are_refused_together(folder: Path, layout: BaseLayout) -> None:
    set_config(folder, use_next_year=True, shift=0.5, empty=[], **{"x" * 100: 1})
    with pytest.raises(AdapterRejected) as caught:
        verify(folder, layout, MAX_RANK)
    assert caught.value.code == "unknown_fields"
    assert f"shift, use_next_year, {'x' * 80}: are not known" in caught.value.reason
    assert "allow_unknown_fields: true" in caught.value.reason


def test_unknown_fields_are_printed_without_control_characters(folder: Path, layout: BaseLayout) -> None:
    set_config(folder, **{"a\n\x1b[31m": 1})
    with pytest.raises(AdapterRejected, match=r"^adapter_config.json: a\?\?\[31m: is not known"):
        verify(folder, layout, MAX_RANK)


def test_unknown_fields_are_accepted_on_request(folder: Path, layout: BaseLayout) -> None:
    plain = verify(folder, layout, MAX_RANK)
    assert plain.unknown_fields == ()
    set_config(folder, use_next_year=True, shift=0.5)
    spec = verify(folder, layout, MAX_RANK, any_fields=True)
    assert (spec.targets, spec.unknown_fields) == (plain.targets, ("shift", "use_next_year"))
    assert read_spec(folder, layout, MAX_RANK, spec.id) == spec, "it is read as it was taken"


@pytest.mark.parametrize("name", ["dora", "fully_trained", "pissa", "loftq", "unknown_init", "many_unknown"])
def test_unsupported_fields_are_refused_even_on_request(name: str, folder: Path, layout: BaseLayout) -> None:
    DEFECTS["modules_to_save" if name == "fully_trained" else name].spoil(folder)
    with pytest.raises(AdapterRejected):
        verify(folder, layout, MAX_RANK, any_fields=True)


def test_loftq_refusal_does_not_suggest_conversion(folder: Path, layout: BaseLayout) -> None:
    for init, converted in (("pissa", True), ("loftq", False)):
        set_config(folder, init_lora_weights=init)
        with pytest.raises(AdapterRejected) as caught:
            verify(folder, layout, MAX_RANK)
        assert ("path_initial_model_for_weight_conversion" in caught.value.reason) is converted
        assert ("cannot be converted" in caught.value.reason) is not converted
