"""Trained layers, and the lint, which must agree with the server's own rules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters.errors import AdapterRejected
from adapters.format.verify import verify
from bases.base import Base, make_base
from bases.errors import ConfigError
from tests.tiny import tiny_model, tiny_tokenizer
from training.model.dropout import Dropout
from training.model.lora import LintFinding, check_findings, count_parameters, lint, lora_config, new_peft_model
from training.settings import TrainSettings


def tiny(architecture: str = "llama") -> Base:
    return make_base(tiny_model(architecture), tiny_tokenizer(), "tiny")


def asked(**settings: Any) -> TrainSettings:
    return TrainSettings(data=("rows.jsonl",), name="x", **settings)


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("qv", {"q_proj", "v_proj"}),
        ("up_proj, o_proj", {"up_proj", "o_proj"}),
        ("self_attn.q_proj", {"q_proj"}),
        ("model.layers.1.mlp.up_proj", {"model.layers.1.mlp.up_proj"}),
    ],
)
def test_targets(targets: str, leaves: set[str]) -> None:
    assert lora_config(asked(targets=targets), tiny()).target_modules == leaves


def test_fused_projections_are_qv_too() -> None:
    assert lora_config(asked(targets="qv"), tiny("phi3")).target_modules == {"qkv_proj"}


def test_unknown_target_is_reported_with_the_available_ones() -> None:
    with pytest.raises(
        ConfigError, match="no layer 'c_attn'; available are all-linear, attention, qv, and down_proj, gate"
    ):
        lora_config(asked(targets="q_proj,c_attn"), tiny())


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True, "alpha": 7.5}, {"dora": True, "targets": "qv"}, {"targets": "lm_head,q_proj", "r": 3}],
)
def test_parameter_count_equals_pefts(settings: dict[str, Any]) -> None:
    base = tiny()
    counted = count_parameters(asked(**settings), base)
    with new_peft_model(asked(**settings), base) as model:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_base_is_restored_on_exit() -> None:
    base = tiny()
    before = base.model.state_dict()
    with new_peft_model(asked(), base):
        assert base.model.state_dict().keys() != before.keys()
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


def test_seed_initialises_the_adapter() -> None:
    def first(seed: int) -> torch.Tensor:
        with new_peft_model(asked(seed=seed), tiny()) as model:
            return next(p.clone() for p in model.parameters() if p.requires_grad)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({}, True),
        ({"rslora": True}, True),
        ({"r": 256, "targets": "qv"}, True),
        ({"r": 257, "targets": "qv"}, False),
        ({"dora": True, "targets": "qv"}, False),
        ({"targets": "lm_head"}, False),
        ({"targets": "q_proj,embed_tokens"}, False),
        ({"alpha": 70000.0}, False),
    ],
)
def test_lint_agrees_with_the_server(settings: dict[str, Any], served: bool, tmp_path: Path) -> None:
    base = tiny()
    findings = lint(asked(**settings), base)
    assert any(finding.server == "manylora" for finding in findings) is not served
    with new_peft_model(asked(**settings), base) as model:
        save(model, tmp_path)
    if served:
        verify(tmp_path, base.layout, max_rank=256)
    else:
        with pytest.raises(AdapterRejected):
            verify(tmp_path, base.layout, max_rank=256)


def save(model: PeftModel, folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(str(folder), save_embedding_layers=False)


def test_lint_for_vllm() -> None:
    base = tiny()
    assert lint(asked(r=16), base) == []
    assert lint(asked(r=17), base) == [LintFinding("note", "vllm", "start it with --max-lora-rank 32")]
    refused = [finding.message for finding in lint(asked(dora=True, r=600), base) if finding.server == "vllm"]
    assert refused == ["its rank is 600; up to 512 are supported", "DoRA is not supported"]


def test_a_refusal_stops_a_run_that_needs_the_server() -> None:
    base = tiny()
    dora = asked(dora=True)
    check_findings(dora, lint(dora, base))
    published = asked(dora=True, publish="http://localhost:8000")
    with pytest.raises(ConfigError, match=r"^--publish: manylora will refuse this adapter: .*DoRA is not served"):
        check_findings(published, lint(published, base))
    strict = asked(r=600, lint="strict")
    with pytest.raises(ConfigError, match=r"^--lint strict: manylora will refuse this adapter: its rank is 600"):
        check_findings(strict, lint(strict, base))


def test_dropout_share_and_mean() -> None:
    torch.manual_seed(0)
    dropout = Dropout(0.25)
    given = torch.ones(999, 101, requires_grad=True)
    taken = dropout(given)
    assert float((taken == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert taken.unique().tolist() == pytest.approx([0.0, 1 / 0.75], rel=1e-4)
    taken.sum().backward()
    assert torch.equal(given.grad, taken)
    assert torch.equal(dropout.eval()(given), given)


def test_dropout_of_neighbours_is_independent() -> None:
    """Four elements share the bits of one random number."""
    torch.manual_seed(0)
    fours = (Dropout(0.5)(torch.ones(40_000)) == 0).float().view(-1, 4)
    correlations = torch.corrcoef(fours.T) - torch.eye(4)
    assert correlations.abs().max() < 0.05


def test_every_adapter_gets_our_dropout() -> None:
    with new_peft_model(asked(), tiny()) as model:
        found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        assert len(found) == 14
        assert {(type(module), module.p) for module in found} == {(Dropout, 0.05)}
