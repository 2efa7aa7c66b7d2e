"""Training runs of a tiny base: losses, files, and errors."""

from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from adapters.format.verify import verify
from bases.base import load_base
from bases.errors import ConfigError
from bases.nf4 import Linear4bit, functional
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.rows import chat, write_rows
from tests.training.tiny_run import losses, prepared, same, tiny_settings, train_on, trained, weights
from training.data.batches import LengthGroupedSampler, make_rows
from training.data.packing import collate
from training.data.rendering import Renderer
from training.errors import Diverged
from training.model.base import open_base
from training.model.lora import new_peft_model
from training.model.loss import answer_loss, summed_loss
from training.run.callbacks import overfits
from training.run.run_folder import RunFolder
from training.settings import TrainSettings

needs_avx512_bf16 = pytest.mark.skipif(not functional.has_avx512bf16(), reason="no AVX512-BF16")


# What is computed


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_loss_equals_the_models_own(architecture: str) -> None:
    """gemma2 caps its logits after the output layer."""
    model = tiny_model(architecture)
    batch = collate(rows_of("Hi", "A longer question, of some words?"), pad=258)
    sums = answer_loss(model, model.get_output_embeddings(), batch)
    whole = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    torch.testing.assert_close(sums, whole)


def rows_of(*texts: str) -> list[Any]:
    renderer = Renderer(tiny_tokenizer())
    return make_rows([renderer.render(chat(text, f"{text}? Yes.")) for text in texts], 256, packing=False, seed=0)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Rows of very unequal lengths: a mean of the batches' means would be another loss."""
    rows = [{"prompt": "Say a", "completion": "a" * (1 + 9 * place)} for place in range(8)]
    data = (str(write_rows(tmp_path / "uneven.jsonl", rows)),)
    common: dict[str, Any] = {"data": data, "max_steps": 3, "dropout": 0.0, "eval_share": 0, "warmup_steps": 0}
    common["learning_rate"] = 1e-2
    large = trained(tiny_settings(tmp_path, **common, batch_size=8, out=tmp_path / "large"))
    small = trained(tiny_settings(tmp_path, **common, batch_size=2, accumulation=4, out=tmp_path / "small"))
    assert losses(large.history) == pytest.approx(losses(small.history), rel=1e-5)
    assert losses(large.history, "grad_norm") == pytest.approx(losses(small.history, "grad_norm"), rel=1e-4)
    one, other = weights(large.folder), weights(small.folder)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def test_packed_run_has_the_losses_of_an_unpacked_run(tmp_path: Path) -> None:
    base, dataset = prepared(tiny_settings(tmp_path, eval_share=0.5))
    found = {}
    for packing in (False, True):
        rows = make_rows(dataset.evaluation, 256, packing, seed=0)
        batches = [collate(rows[start : start + 2], pad=258) for start in range(0, len(rows), 2)]
        found[packing] = summed_loss(answer_loss, base.model, base.model.get_output_embeddings(), batches)
        assert len(rows) < 12 or not packing
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    run = trained(tiny_settings(tmp_path, eval_share=0.5, packing=True, max_steps=2, warmup_steps=0))
    assert losses(run.history)[0] == pytest.approx(losses(run.history, "eval_loss")[0], rel=0.2)


def test_the_held_out_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, eval_share=0.3, max_steps=1, learning_rate=1e-12)
    base, dataset = prepared(settings)
    rows = make_rows(dataset.evaluation, 256, packing=False, seed=0)
    each = [summed_loss(answer_loss, base.model, base.model.get_output_embeddings(), [collate([r], 258)]) for r in rows]
    run = train_on(settings, base, dataset)
    expected = sum(total for total, _ in each) / sum(tokens for _, tokens in each)
    assert losses(run.history, "eval_loss") == [pytest.approx(expected, rel=1e-4)]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    kept = trained(tiny_settings(tmp_path, gradient_checkpointing=False, out=tmp_path / "kept"))
    again = trained(tiny_settings(tmp_path, gradient_checkpointing=True, out=tmp_path / "again"))
    assert losses(kept.history) == pytest.approx(losses(again.history), rel=1e-6)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one, again, other = (
        weights(trained(tiny_settings(tmp_path, seed=seed, out=tmp_path / name)).folder)
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert same(one, again)
    assert not same(one, other)


def test_run_reduces_the_loss(tmp_path: Path) -> None:
    run = trained(tiny_settings(tmp_path, max_steps=40, learning_rate=2e-2))
    assert losses(run.history, "eval_loss")[-1] < 0.5 * losses(run.history)[0]
    assert run.steps == 40
    assert len(losses(run.history, "eval_loss")) == 4


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 8), st.integers(0, 3))
def test_batches_hold_every_row_once(lengths: list[int], size: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, size, seed=5)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(sampler)


def test_batches_hold_rows_of_similar_lengths_in_random_order() -> None:
    lengths = [1 + place * 7 % 64 for place in range(256)]
    sampler = LengthGroupedSampler(lengths, 4, seed=0)
    first = [[lengths[row] for row in list(sampler)[start : start + 4]] for start in range(0, 256, 4)]
    assert sum(max(batch) * 4 for batch in first) < 1.1 * sum(lengths)
    assert [sum(batch) for batch in first] != sorted(sum(batch) for batch in first)
    sampler.set_epoch(1)
    assert [lengths[row] for row in sampler] != list(chain(*first))


# keep_trainable: bitsandbytes repacks weights at the first forward without gradients


def gradients(model: PeftModel, evaluate: bool) -> list[torch.Tensor]:
    """Return the gradients of one batch, on a model that may have been evaluated before."""
    batch = collate(rows_of("How are you today?", "And why?"), pad=258)
    output = model.get_base_model().get_output_embeddings()
    if evaluate:
        summed_loss(answer_loss, model, output, [batch])
    answer_loss(model, output, batch).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def nf4(root: Path) -> TrainSettings:
    """Settings of a base with layer widths that bitsandbytes' fused kernel supports: multiples of 64."""
    config = tiny_model().config
    config.intermediate_size = 128
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    return tiny_settings(root, quantization="nf4", dtype="bf16", dropout=0.0)


def test_evaluation_leaves_gradients_unchanged(tmp_path: Path) -> None:
    settings = nf4(tmp_path)
    found = []
    for evaluate in (False, True):
        with new_peft_model(settings, open_base(settings)) as model:
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.1)
            found.append(gradients(model, evaluate))
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in found[0])


@needs_avx512_bf16
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")
def test_without_keep_trainable_evaluation_spoils_gradients(tmp_path: Path) -> None:
    """Shows that the test above can fail: if this fails, keep_trainable may no longer be needed."""
    settings = nf4(tmp_path)
    found = []
    for evaluate in (False, True):
        with new_peft_model(settings, load_base(settings.base)) as model:
            found.append(gradients(model, evaluate))
    assert not all(torch.allclose(before, after, rtol=0.1) for before, after in zip(*found, strict=True))


def test_keep_trainable_covers_every_layer(tmp_path: Path) -> None:
    layers = [module for module in open_base(nf4(tmp_path)).model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


# What is left behind


def test_adapter_is_readable_by_peft_and_the_server(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, report_to="tensorboard", learning_rate=1e-2)
    base, dataset = prepared(settings)
    fingerprint = base.layout.fingerprint
    run = train_on(settings, base, dataset)
    files = {"adapter_config.json", "adapter_model.safetensors", "runs", "training.jsonl"}
    assert {path.name for path in run.folder.iterdir()} == files
    assert list((run.folder / "runs").iterdir())
    assert not RunFolder(settings.folder).folder.exists()
    spec = verify(run.folder, base.layout, max_rank=256)
    assert (spec.rank, len(spec.targets)) == (4, 14)
    fresh = open_base(settings)
    assert fresh.layout.fingerprint == fingerprint
    peft = PeftModel.from_pretrained(fresh.model, str(run.folder))
    assert peft.peft_config["default"].base_model_name_or_path == "base"
    assert peft.peft_config["default"].inference_mode
    rows = make_rows(dataset.evaluation, 256, packing=False, seed=0)
    again = summed_loss(answer_loss, peft, peft.get_base_model().get_output_embeddings(), [collate(rows, 258)])
    assert again[0] / again[1] == pytest.approx(losses(run.history, "eval_loss")[-1], rel=1e-5)


def test_non_empty_folder_is_refused_and_unchanged(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    settings.folder.mkdir()
    (settings.folder / "mine").write_text("x")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"--out: .*adapter exists already"):
            trained(tiny_settings(tmp_path, resume=resume))
    assert [path.name for path in settings.folder.iterdir()] == ["mine"]
    assert not RunFolder(settings.folder).folder.exists()


def test_reporting_to_what_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--report-to wandb: the package wandb is not installed"):
        trained(tiny_settings(tmp_path, report_to="wandb"))
    assert not RunFolder(tmp_path / "adapter").folder.exists()


def test_progress_without_a_terminal_is_in_lines(tmp_path: Path) -> None:
    said: list[str] = []
    settings = tiny_settings(tmp_path)
    run = trained(settings, said.append)
    first, last = f"{losses(run.history)[0]:.4f} (1 step), ", f"{mean(losses(run.history)):.4f} (mean of 8 steps), "
    assert [line for line in said if line.startswith(f"step 1/8: training loss {first}")]
    assert [line for line in said if line.startswith(f"step 8/8: training loss {last}") and line.endswith(" 0 s left")]
    assert [line for line in said if line.startswith("step 8: held-out loss ")]


# How it ends


def test_numbers_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, learning_rate=1e38, warmup_steps=0, schedule="constant", save_steps=1)
    with pytest.raises(Diverged, match=r"^step \d: the (loss|gradients' norm) is (nan|inf).*rows.jsonl:\d+") as caught:
        trained(settings)
    step = int(str(caught.value).split()[1].rstrip(":"))
    assert not settings.folder.exists()
    assert RunFolder(settings.folder).last_checkpoint().name == f"checkpoint-{step - 1}"


def test_early_stopping_ends_the_run_with_the_best_adapter(tmp_path: Path) -> None:
    settings = tiny_settings(
        tmp_path, early_stopping=1, eval_steps=4, max_steps=200, learning_rate=5e-2, schedule="constant", eval_share=0.3
    )
    base, dataset = prepared(settings)
    run = train_on(settings, base, dataset)
    evaluated = losses(run.history, "eval_loss")
    assert run.steps < 200
    assert evaluated[-1] >= evaluated[-2] == min(evaluated)
    peft = PeftModel.from_pretrained(base.model, str(run.folder))
    rows = make_rows(dataset.evaluation, 256, packing=False, seed=0)
    total, tokens = summed_loss(answer_loss, peft, base.model.get_output_embeddings(), [collate(rows, 258)])
    assert total / tokens == pytest.approx(min(evaluated), rel=1e-5)


def test_early_stopping_needs_rows_that_are_held_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--early-stopping: needs held-out rows, and no row is held out"):
        trained(tiny_settings(tmp_path, early_stopping=1, eval_share=0))
    with pytest.raises(ConfigError, match=r"^--save-steps: must equal --eval-steps \(4\) with --early-stopping"):
        trained(tiny_settings(tmp_path, early_stopping=1, eval_steps=4, save_steps=8))


def test_packing_needs_a_base_that_keeps_examples_apart(tmp_path: Path) -> None:
    """OPT does not pass its position ids to the function that builds the mask."""
    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=320, num_attention_heads=4, max_position_embeddings=256, **size)
    OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings = tiny_settings(tmp_path, packing=True, quantization="none")
    with pytest.raises(ConfigError, match=r"^--packing: this base lets an example attend to the one before it"):
        trained(settings)
    assert not RunFolder(settings.folder).folder.exists()


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [entry for loss, held_out in points for entry in ({"loss": loss}, {"loss": loss}, {"eval_loss": held_out})]


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([(3, 3), (2, 2.5), (1, 2.4)], False),
        ([(3, 2), (2, 2.1)], False),
        ([(3, 2), (2, 2.1), (1, 2.2)], True),
        ([(3, 2), (2, 2.1), (2.5, 2.2)], False),
        ([(3, 2), (2, 2.1), (1, 2.0)], False),
    ],
)
def test_overfitting_means_eval_loss_rises_twice(points: list[tuple[float, float]], told: bool) -> None:
    assert overfits(curve(*points)) is told


def test_overfitting_is_warned_of_once(tmp_path: Path) -> None:
    """A learning rate at which losses are smooth: at 1e-2 the result depended on the last bit of a weight."""
    rows = [{"prompt": f"Draw {place}", "completion": str((place * 7919) % 997)} for place in range(16)]
    data = (str(write_rows(tmp_path / "random.jsonl", rows)),)
    settings = tiny_settings(
        tmp_path, data=data, eval_share=0.4, max_steps=120, eval_steps=10, learning_rate=2e-3, r=16, schedule="constant"
    )
    run = trained(settings)
    assert [warning.partition(" has risen")[0].partition(": ")[2] for warning in run.warnings] == ["the held-out loss"]
