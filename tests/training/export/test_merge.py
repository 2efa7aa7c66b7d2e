"""Merges, compared with their definitions on dense updates, and with PEFT where PEFT is exact."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapters.errors import AdapterRejected
from adapters.format.spec import BaseLayout
from adapters.format.verify import verify
from adapters.format.weights import read_weights
from bases.errors import ConfigError
from bases.options import BaseOptions
from tests.adapter_folders import layout_of, set_config
from tests.tiny import save_adapter, tiny_model, tiny_tokenizer
from training.export.export import export
from training.export.merge import Method, check_merge, merge

WEIGHTS = (0.7, -0.3)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    return layout_of(tiny_model())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of different rank, scaling and targets; both target attention."""
    root = tmp_path_factory.mktemp("adapters")
    attention = ["q_proj", "v_proj"]
    one: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": [*attention, "down_proj"]}
    other: dict[str, Any] = {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": attention}
    return save_adapter(tiny_model(), root / "one", 1, **one), save_adapter(tiny_model(), root / "other", 2, **other)


def weighted(folders: tuple[Path, Path]) -> list[tuple[Path, float]]:
    return list(zip(folders, WEIGHTS, strict=True))


def updates(folder: Path, layout: BaseLayout) -> Mapping[str, Tensor]:
    """Layer -> ``scaling * B @ A`` in float64."""
    weights = read_weights(folder, verify(folder, layout, 64))
    return {
        layer: weights.spec.targets[layer].scaling * b.double() @ a.double()
        for layer, (a, b) in weights.tensors.items()
    }


def weighted_sum(folders: tuple[Path, Path], layout: BaseLayout) -> Mapping[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, weight in weighted(folders):
        for layer, update in updates(folder, layout).items():
            total[layer] = total.get(layer, torch.zeros_like(update)) + weight * update
    return total


def ties_by_hand(parts: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Trim to the largest entries, elect the sign with the most mass, average the weighted entries that have it."""
    trimmed = []
    for part in parts:
        kept = int(density * part.numel())
        smallest = part.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(part.abs() >= smallest, part, 0))
    sign = torch.stack(trimmed).sum(0).sign()
    agreeing = [torch.where(part.sign() == sign, part, 0) for part in trimmed]
    count = torch.stack([part != 0 for part in agreeing]).sum(0).clamp(min=1)
    return sum((w * part for w, part in zip(weights, agreeing, strict=True)), torch.zeros_like(sign)) / count


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < 1e-5 * expected.norm())


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_merge_is_exact(method: Method, folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    result = merge(weighted(folders), layout, tmp_path / "out", method=method)
    expected, found = weighted_sum(folders, layout), updates(tmp_path / "out", layout)
    assert found.keys() == expected.keys()
    assert all(close(found[layer], expected[layer]) for layer in expected)
    assert (result.spec.rank, result.lost) == (10, 0.0)


def test_peft_loads_it_and_gives_the_same_logits(
    folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path
) -> None:
    """The base with the dense sum added, against PEFT with the merged folder."""
    said: list[str] = []
    merge(weighted(folders), layout, tmp_path / "out", say=said.append)
    assert said == [f"merging 2 adapters, layer by layer: {done} of 6" for done in (0, 6)]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    dense = copy.deepcopy(tiny_model())
    with torch.no_grad():
        for layer, update in weighted_sum(folders, layout).items():
            dense.get_submodule(layer).weight.add_(update)
        ids = torch.arange(30)[None]
        adapted = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
        assert (adapted(ids).logits - dense(ids).logits).abs().max() < 1e-3
        assert (adapted(ids).logits - tiny_model()(ids).logits).abs().max() > 0.1


def test_cat_equals_pefts_and_linear_differs(folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    """PEFT's ``linear`` sums the A and the B matrices separately: the cross terms are as large as the sum."""
    equal = save_adapter(tiny_model(), tmp_path / "equal", 3, r=6, lora_alpha=6, target_modules=["q_proj"])
    peft = PeftModel.from_pretrained(tiny_model(), folders[0], "one")
    peft.load_adapter(equal, "equal")
    pair = (folders[0], equal)
    expected = weighted_sum(pair, layout)[Q]
    for method, exact in (("cat", True), ("linear", False)):
        peft.add_weighted_adapter(["one", "equal"], list(WEIGHTS), method, combination_type=method)
        merge(weighted(pair), layout, tmp_path / method, method=method)  # type: ignore[arg-type]
        theirs = peft.base_model.model.get_submodule(Q).get_delta_weight(method)
        assert close(updates(tmp_path / method, layout)[Q], expected)
        assert close(theirs.double(), expected) == exact
    assert (theirs - expected).norm() > 0.5 * expected.norm()


def test_svd_is_the_best_of_its_rank(folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    result = merge(weighted(folders), layout, tmp_path / "out", method="svd", rank=3)
    expected, found = weighted_sum(folders, layout), updates(tmp_path / "out", layout)
    left_out = 0.0
    for layer, update in expected.items():
        u, s, vh = torch.linalg.svd(update)
        assert close(found[layer], (u[:, :3] * s[:3]) @ vh[:3])
        left_out += s[3:].square().sum().item()
    total = sum(update.square().sum().item() for update in expected.values())
    assert result.lost == pytest.approx((left_out / total) ** 0.5, rel=1e-4)
    assert result.spec.rank == 3


def test_svd_of_full_rank_is_exact(folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    result = merge(weighted(folders), layout, tmp_path / "out", method="svd", rank=10)
    found = updates(tmp_path / "out", layout)
    assert result.lost < 1e-6
    assert all(close(found[layer], update) for layer, update in weighted_sum(folders, layout).items())


def test_ties_works_on_the_updates(folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    """At full rank nothing is lost, so that the definition can be compared entry by entry."""
    merge(weighted(folders), layout, tmp_path / "out", method="ties", rank=64, density=0.3)
    found = updates(tmp_path / "out", layout)
    one, other = (updates(folder, layout) for folder in folders)
    assert close(found[Q], ties_by_hand([one[Q], other[Q]], list(WEIGHTS), 0.3))
    assert close(found[DOWN], ties_by_hand([one[DOWN]], [WEIGHTS[0]], 0.3))


def test_dare_ties_drops_at_random_and_scales_up(
    folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        merge(weighted(folders), layout, tmp_path / name, method="dare_ties", rank=64, density=0.5, seed=seed)
    # Only one adapter has this layer: each entry is 0, or twice its weighted value.
    found, whole = updates(tmp_path / "a", layout)[DOWN], WEIGHTS[0] * updates(folders[0], layout)[DOWN]
    kept = found.abs() > 1e-4 * whole.abs()
    clear = whole.abs() > 0.01
    assert ((found - 2 * whole).abs() < 1e-3)[kept & clear].all()
    assert 0.45 < kept[clear].double().mean() < 0.55
    assert torch.equal(found, updates(tmp_path / "again", layout)[DOWN])
    assert not torch.equal(found, updates(tmp_path / "b", layout)[DOWN])


def test_weights_1_and_0_give_the_first_adapter(folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    result = merge([(folders[0], 1.5), (folders[0], -0.5)], layout, tmp_path / "out", method="svd")
    found = updates(tmp_path / "out", layout)
    assert result.spec.rank == 6
    assert all(close(found[layer], update) for layer, update in updates(folders[0], layout).items())


def test_base_is_named_only_if_all_adapters_name_it(
    layout: BaseLayout, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    known = []
    for name in ("a", "b"):
        folder = save_adapter(tiny_model(), tmp_path / name, 5, target_modules=["q_proj"])
        (folder / "manylora.json").write_text(f'{{"base_fingerprint": "{layout.fingerprint}"}}')
        known.append((folder, 0.5))
    assert merge(known, layout, tmp_path / "known").spec.base_fingerprint == layout.fingerprint
    unknown = [known[0], (folders[0], 0.5)]
    assert merge(unknown, layout, tmp_path / "unknown").spec.base_fingerprint is None


def described(folder: Path, **origin: Any) -> Path:
    """An adapter with a ``manylora.json``."""
    save_adapter(tiny_model(), folder, 5, target_modules=["q_proj"])
    (folder / "manylora.json").write_text(json.dumps(origin))
    return folder


def test_merged_manifest_has_the_base_parts_that_agree(layout: BaseLayout, tmp_path: Path) -> None:
    agreed = {
        "format": 1,
        "base_fingerprint": layout.fingerprint,
        "base": {"name": "tiny", "model": None},
        "quantization": {"method": "none", "dtype": "float32"},
    }
    parts = [(described(tmp_path / name, **agreed, chat_template_sha256=name, seed=1), 0.5) for name in ("a", "b")]
    merge(parts, layout, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "manylora.json").read_text())
    files = {"weights_sha256": "adapter_model.safetensors", "adapter_config_sha256": "adapter_config.json"}
    hashes = {
        field: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for field, name in files.items()
    }
    del written["merge"]
    assert written == {**agreed, **hashes}


def test_unknown_fields_are_merged_only_if_allowed(layout: BaseLayout, tmp_path: Path) -> None:
    parts = [(described(tmp_path / name), 0.5) for name in ("one", "other")]
    set_config(parts[1][0], shift=0.5)
    with pytest.raises(AdapterRejected, match="shift: is not known"):
        merge(parts, layout, tmp_path / "out")
    assert merge(parts, layout, tmp_path / "out", allow_unknown_fields=True).spec.unknown_fields == ()


def test_adapters_of_different_bases_cannot_be_merged(layout: BaseLayout, tmp_path: Path) -> None:
    one = described(tmp_path / "one", base_fingerprint=layout.fingerprint)
    other = described(tmp_path / "other", base_fingerprint="f" * 64)
    parts = [(one, 0.5), (other, 0.5)]
    reason = rf"^--merge: {one} was trained on the base fp_0{{12}} and {other} on fp_f{{12}}: adapters of different "
    reason += "bases cannot be merged$"
    with pytest.raises(ConfigError, match=reason):
        merge(parts, layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge(parts, layout, tmp_path / "out", allow_base_mismatch=True).spec.base_fingerprint is None


def test_equivalent_fingerprints_can_be_merged(layout: BaseLayout, tmp_path: Path) -> None:
    """Another processor may have rounded the base differently; before the base is loaded, base_parts decides."""
    layout = dataclasses.replace(layout, equivalents=frozenset({"e" * 64}))
    said = {"tokenizer_sha256": "t", "base_parts": {"weights": "w"}}
    one = described(tmp_path / "one", base_fingerprint=layout.fingerprint, **said)
    parts = [(one, 0.5), (described(tmp_path / "other", base_fingerprint="e" * 64, **said), 0.5)]
    check_merge(parts, tmp_path / "out", "linear", None)
    merge(parts, layout, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "manylora.json").read_text())
    assert (written["base_fingerprint"], written["base_parts"]) == (layout.fingerprint, {"weights": "w"})
    unlike = [(one, 0.5), (described(tmp_path / "unlike", base_fingerprint="f" * 64, **said), 0.5)]
    check_merge(unlike, tmp_path / "new", "linear", None)
    with pytest.raises(ConfigError, match="different bases cannot be merged"):
        merge(unlike, layout, tmp_path / "new")
    said["base_parts"] = {"weights": "x"}
    with pytest.raises(ConfigError, match="different bases cannot be merged"):
        check_merge(
            [(one, 0.5), (described(tmp_path / "third", base_fingerprint="e" * 64, **said), 0.5)],
            tmp_path / "new",
            "linear",
            None,
        )


def test_a_merge_can_be_exported(folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    merge(weighted(folders), layout, tmp_path / "merged", method="ties")
    base = BaseOptions(str(tmp_path / "base"), tmp_path, quantization="none", dtype="fp32")
    report = export(tmp_path / "merged", base, tmp_path / "out", dtype="fp32")
    assert report.divergence.mean_kl < 1e-5


def test_chat_template_is_kept_if_all_adapters_have_it(layout: BaseLayout, tmp_path: Path) -> None:
    known = [(save_adapter(tiny_model(), tmp_path / name, 5, target_modules=["q_proj"]), 0.5) for name in ("a", "b")]
    (tmp_path / "a" / "chat_template.jinja").write_text("one")
    with pytest.raises(ConfigError, match="different chat templates"):
        merge(known, layout, tmp_path / "mixed")
    (tmp_path / "b" / "chat_template.jinja").write_text("one")
    merge(known, layout, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "one"


@pytest.mark.parametrize(
    ("options", "weights", "reason"),
    [
        ({"method": "slerp"}, WEIGHTS, "--method: must be one of linear, cat, svd, ties, dare_ties"),
        ({}, (1.0,), "--merge: needs two adapters"),
        ({}, (1.0, 0.0), "the weight of other must be a number other than 0"),
        ({}, (float("nan"), 1.0), "the weight of one must be a number"),
        ({"rank": 4}, WEIGHTS, "--rank: linear keeps the sum of the adapters' ranks; use svd"),
        ({"method": "svd", "rank": 0}, WEIGHTS, "--rank: must be 1 to"),
        ({"method": "ties", "density": 0.0}, WEIGHTS, "--density: must be above 0 and below 1"),
    ],
)
def test_option_errors(
    options: dict[str, Any],
    weights: tuple[float, ...],
    reason: str,
    folders: tuple[Path, Path],
    layout: BaseLayout,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=reason):
        merge(list(zip(folders, weights, strict=False)), layout, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_cancel_out_are_refused(folders: tuple[Path, Path], layout: BaseLayout, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="changes nothing"):
        merge([(folders[0], 1.0), (folders[0], -1.0)], layout, tmp_path / "out", method="ties", density=0.99)
    assert list(tmp_path.iterdir()) == []
