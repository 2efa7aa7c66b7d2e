"""LinearGroup, compared with PEFT's layers and with numeric derivatives."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from bases.base import Base, make_base
from bases.nf4 import Linear4bit
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from tests.training.rows import chat
from tests.training.tiny_run import losses, tiny_settings, trained
from training.data.batches import make_rows
from training.data.packing import collate
from training.data.rendering import Renderer
from training.model.base import open_base
from training.model.dropout import apply_mask, dropout_mask, dropout_scale
from training.model.linear_group import AdaptedLinear, LinearGroup
from training.model.lora import new_peft_model
from training.model.lora_patch import patch_lora_layers
from training.model.loss import answer_loss, summed_loss
from training.settings import TrainSettings


def asked(**settings: Any) -> TrainSettings:
    return TrainSettings(
        **{"data": ("rows.jsonl",), "name": "x", "r": 4, "dropout": 0.0, "quantization": "none", **settings}
    )


def nf4_base(root: Path, dtype: str) -> Base:
    """Quantised, with layers of widths that no table of kernels leaves out."""
    config = tiny_model().config
    config.intermediate_size = 128
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    return open_base(tiny_settings(root, quantization="nf4", dtype=dtype))


def batch() -> dict[str, Any]:
    renderer = Renderer(tiny_tokenizer())
    texts = ("How are you today?", "And why?", "A longer question, of some words?")
    examples = [renderer.render(chat(text, f"{text}? Yes.")) for text in texts]
    return collate(make_rows(examples, 256, packing=False, seed=0), pad=258)


def computed(model: PeftModel, way: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch, with B away from 0."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = None
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.data.normal_(std=0.1)
    with way:
        loss = answer_loss(model, model.get_base_model().get_output_embeddings(), batch())
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("llama", {"rslora": True, "alpha": 7.5}),
        ("llama", {"targets": "qv"}),
        ("qwen2", {"targets": "k_proj,up_proj"}),
        ("llama", {"targets": "lm_head,o_proj"}),
    ],
)
def test_loss_and_gradients_equal_pefts(architecture: str, settings: dict[str, Any]) -> None:
    base = make_base(tiny_model(architecture), tiny_tokenizer(), "tiny")
    with new_peft_model(asked(**settings), base) as model:
        compare(computed(model, nullcontext()), computed(model, patch_lora_layers(model, unpack=True)))


def compare(reference: tuple[float, dict[str, Tensor]], ours: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(reference[0], rel=1e-6)
    for name, gradient in reference[1].items():
        assert ours[1][name].dtype == torch.float32
        assert gradient.norm() > 0
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("unpack", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", "qv"])
def test_loss_and_gradients_over_4_bit_layers(targets: str, unpack: bool, tmp_path: Path) -> None:
    base = nf4_base(tmp_path, "fp32")
    with new_peft_model(asked(targets=targets), base) as model:
        compare(computed(model, nullcontext()), computed(model, patch_lora_layers(model, unpack=unpack)))


def test_bf16_gradients_are_as_accurate_as_pefts(tmp_path: Path) -> None:
    """Compared with float32 on the same 4-bit weights."""
    found = {}
    for dtype in ("fp32", "bf16"):
        with new_peft_model(asked(), nf4_base(tmp_path, dtype)) as model:
            found[dtype] = computed(model, nullcontext())[1]
            if dtype == "bf16":
                loss, found["ours"] = computed(model, patch_lora_layers(model, unpack=True))
    assert loss > 0
    exact = flat(found["fp32"])
    error = {way: float((flat(found[way]) - exact).norm() / exact.norm()) for way in ("bf16", "ours")}
    assert error["ours"] < 1.5 * error["bf16"] < 0.2


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_evaluation_does_not_change_gradients(tmp_path: Path) -> None:
    with new_peft_model(asked(), nf4_base(tmp_path, "bf16")) as model, patch_lora_layers(model, unpack=True):
        before = computed(model, nullcontext())[1]
        summed_loss(answer_loss, model, model.get_base_model().get_output_embeddings(), [batch()])
        after = computed(model, nullcontext())[1]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_equals_pefts(tmp_path: Path) -> None:
    """Without dropout; the base's own output if the adapter is disabled."""
    base = make_base(tiny_model(), tiny_tokenizer(), "tiny")
    with new_peft_model(asked(dropout=0.5), base) as model:
        computed(model, nullcontext())
        model.eval()
        given = {name: value for name, value in batch().items() if name != "labels"}
        with torch.no_grad():
            reference = model(**given).logits
            with patch_lora_layers(model, unpack=True):
                torch.testing.assert_close(model(**given).logits, reference, rtol=1e-4, atol=1e-5)
                with model.disable_adapter():
                    off = model(**given).logits
        assert not torch.allclose(off, reference, rtol=1e-2)
    with torch.no_grad():
        assert torch.equal(base.model(**given).logits, off)


# The derivatives


def doubles(dropout: float) -> tuple[LinearGroup, list[Tensor]]:
    """Two layers of ranks 2 and 3 over one input, in float64; and what they depend on: x, A, B, A, B."""
    torch.manual_seed(0)
    shapes = [(5, 2), (4, 3)]
    factors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for n, r in shapes for shape in ((r, 6), (n, r))
    ]
    members = []
    for place, (n, _) in enumerate(shapes):
        weight, bias = torch.randn(n, 6, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
        down, up = factors[2 * place : 2 * place + 2]
        layer = nn.Module()
        layer.disable_adapters = layer.merged = False
        members.append(AdaptedLinear(layer, lambda weight=weight: weight, torch.float64, bias, down, up, 0.7 + place))
    return LinearGroup(members, dropout), [torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True), *factors]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_backward_passes_gradcheck(dropout: float) -> None:
    """With dropout, too: the backward pass must use the mask of the forward pass."""
    siblings, inputs = doubles(dropout)

    def drawn_alike(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return siblings.compute(x)

    assert torch.autograd.gradcheck(drawn_alike, inputs)


def test_dropout_applies_only_to_the_adapters_input() -> None:
    siblings, (x, *_) = doubles(0.4)
    torch.manual_seed(1)
    found = siblings.compute(x)
    torch.manual_seed(1)
    dropped = apply_mask(x.detach(), dropout_mask(0.4, x)) * dropout_scale(0.4)
    for member, output in zip(siblings.members, found, strict=True):
        expected = x @ member.weight().T + member.bias + member.scale * dropped @ member.down.T @ member.up.T
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_rate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kept = apply_mask(torch.ones(999, 101, dtype=dtype), dropout_mask(0.05, torch.empty(999, 101, dtype=dtype)))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert float((kept == 0).float().mean()) == pytest.approx(0.05, abs=0.003)
    assert dropout_scale(0.05) == pytest.approx(1 / 0.95, rel=1e-4)


def test_another_input_is_computed_anew() -> None:
    siblings, (x, *_) = doubles(0.0)
    first, second = (siblings.forward_of(number) for number in range(2))
    other = torch.randn_like(x)
    expected, of_other = siblings.compute(x), siblings.compute(other)
    for number, forward in ((0, first), (1, second)):
        torch.testing.assert_close(forward(other), of_other[number])
        torch.testing.assert_close(forward(x), expected[number])
        torch.testing.assert_close(forward(x), expected[number])


# Supported layers, and those that keep PEFT's forward


def forwards(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if "forward" in vars(module))


def test_patch_is_removed_on_exit(tmp_path: Path) -> None:
    base = nf4_base(tmp_path, "bf16")
    before = set(forwards(base.model))
    with new_peft_model(asked(targets="qv"), base) as model:
        with patch_lora_layers(model, unpack=True) as left:
            assert left == []
            assert len(set(forwards(model.get_base_model())) - before) == 14
        assert set(forwards(model.get_base_model())) == before
    assert all(type(m) is not Linear4bit or "forward" not in vars(m) for m in base.model.modules())


@pytest.mark.parametrize(
    ("settings", "left"), [({"dora": True, "targets": "qv"}, 4), ({"targets": "embed_tokens,q_proj"}, 1)]
)
def test_unsupported_layers_keep_pefts_forward(settings: dict[str, Any], left: int) -> None:
    base = make_base(tiny_model(), tiny_tokenizer(), "tiny")
    with new_peft_model(asked(**settings), base) as model:
        reference = computed(model, nullcontext())
        with patch_lora_layers(model, unpack=True) as names:
            assert len(names) == left
        compare(reference, computed(model, patch_lora_layers(model, unpack=True)))


def test_run_reports_layers_that_keep_pefts_forward(tmp_path: Path) -> None:
    said: list[str] = []
    run = trained(tiny_settings(tmp_path, dora=True, targets="qv"), said.append)
    assert len(losses(run.history)) == 8
    assert [line for line in said if line.startswith("4 adapted layers, such as ") and "run PEFT's own forward" in line]
