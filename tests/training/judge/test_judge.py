"""Judging: batched answers equal single ones, scores equal their definitions, and the thresholds."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from bases.base import Base
from bases.errors import ConfigError
from tests.tiny import save_adapter, tiny_model
from tests.training.rows import chat, write_rows
from tests.training.tiny_run import prepared, tiny_settings
from training.data.dataset import Dataset
from training.data.rendering import UNTRAINED, Example, Renderer
from training.judge.generate import Answer, generate
from training.judge.judge import Judgement, answerable, check_thresholds, general_examples, judge
from training.judge.scores import Scores, mean_kl, mean_loss, parse_json, score_answers

ENDS = frozenset(range(0, 264, 12))
"""Enough EOS tokens that random answers end at all lengths."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with a strong and a weak adapter."""
    root = tmp_path_factory.mktemp("judge")
    save_adapter(tiny_model(), root / "strong", 1, r=4, target_modules="all-linear")
    save_adapter(tiny_model(), root / "weak", 2, strength=1e-4, r=4, target_modules="all-linear")
    rows = [{"instruction": f"Row {n}?", "output": f'{{"n": {n}}}'} for n in range(30)]
    write_rows(root / "rows.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def ready(root: Path) -> tuple[Base, Dataset]:
    return prepared(tiny_settings(root, eval_share=0.3))


@pytest.fixture
def adapted(root: Path, ready: tuple[Base, Dataset]) -> Iterator[PeftModel]:
    """The base with the strong adapter, in eval mode."""
    model = PeftModel.from_pretrained(ready[0].model, root / "strong").eval()
    yield model
    model.unload()


def judged(root: Path, ready: tuple[Base, Dataset], folder: str = "weak", **more: Any) -> Judgement:
    return judge(tiny_settings(root, judge_tokens=16, **more), ready[0], root / folder, ready[1])


@torch.no_grad()
def one_by_one(model: Any, prompt: list[int], limit: int) -> Answer:
    """Return the greedy answer, without a KV cache."""
    answer = Answer()
    while len(answer.tokens) < limit:
        token = int(model(torch.tensor([prompt + answer.tokens])).logits[0, -1].argmax())
        if token in ENDS:
            return Answer(answer.tokens, ended=True)
        answer.tokens.append(token)
    return answer


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_batched_answers_equal_those_of_single_prompts(architecture: str) -> None:
    """Mistral's and Gemma-2's windows are shorter than the prompts."""
    model: Any = tiny_model(architecture)
    prompts = [[(7 * place + row) % 250 for place in range(3 + 4 * row)] for row in (5, 0, 3, 1, 8, 2, 6)]
    answers = generate(model, prompts, ENDS, 20, 256, rows=3)
    assert answers == [one_by_one(model, prompt, 20) for prompt in prompts]
    assert any(answer.ended for answer in answers)
    assert len({len(answer.tokens) for answer in answers}) > 2


def test_answers_end_at_the_context_limit() -> None:
    prompts = [[1] * 10, [2] * 14]
    answers = generate(tiny_model(), prompts, frozenset(), max_tokens=20, context=16)
    assert [len(answer.tokens) for answer in answers] == [6, 2]


def examples(count: int) -> list[Example]:
    """Rows of different lengths, trained but for the first third."""
    rows = []
    for row in range(count):
        ids = [(11 * place + row) % 250 for place in range(6 + 5 * row)]
        start = len(ids) // 3
        rows.append(Example(ids, [UNTRAINED] * start + ids[start:], f"x:{row}", start, "x"))
    return rows


@torch.no_grad()
def test_the_loss_is_the_mean_over_trained_tokens(adapted: PeftModel) -> None:
    rows = examples(7)
    losses = []
    for row in rows:
        logits = adapted(torch.tensor([row.input_ids])).logits[0, :-1]
        losses.append(F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum"))
    expected = sum(losses) / sum(row.trained for row in rows)
    assert mean_loss(adapted, rows) == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_the_divergence_is_kl_of_the_adapter_from_the_base(adapted: PeftModel) -> None:
    rows = examples(5)
    total = 0.0
    for row in rows:
        ids, wanted = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:]) != UNTRAINED
        ours = adapted(ids).logits[0, :-1][wanted].log_softmax(-1)
        with adapted.disable_adapter():
            base = adapted(ids).logits[0, :-1][wanted].log_softmax(-1)
        total += float(F.kl_div(base, ours, reduction="sum", log_target=True))
    assert mean_kl(adapted, rows) == pytest.approx(total / sum(row.trained for row in rows), rel=1e-3)
    assert total > 1


def score(*pairs: tuple[str, str]) -> Scores:
    """Return the scores of (right answer, given answer) pairs."""
    rows = [Example([1, 2], [UNTRAINED, 2], "x", 1, right) for right, _ in pairs]
    return score_answers(rows, [Answer([1], ended=True)] * len(pairs), [said for _, said in pairs])


def test_json_scores() -> None:
    right = '{"a": 1, "b": [2]}'
    scores = score((right, right), (right, '{"b":[2],"a":1}'), (right, '{"a": 2}'), (right, f"Sure: {right}"))
    assert scores == Scores(None, exact_match=0.25, stop_share=1.0, json_validity=0.75, json_equality=0.5)


def test_no_json_validity_without_json_answers() -> None:
    assert score(("yes", " yes\n"), ("7", "7")) == Scores(None, exact_match=1.0, stop_share=1.0)
    mixed = score(("yes", "yes"), ("[1]", "1"))
    assert (mixed.json_validity, mixed.json_equality) == (0.0, 0.0)


@pytest.mark.parametrize("text", ["7", '"a"', "null", "", "{", "{} {}", "[" * 100_000, '{"a": NaN}', "[-Infinity]"])
def test_parse_json_rejects_everything_but_objects_and_arrays(text: str) -> None:
    assert parse_json(text) is None


@pytest.mark.parametrize(
    ("right", "said", "equal"),
    [
        ('{"a": true}', '{"a": 1}', False),
        ("[0]", "[false]", False),
        ("[1, 2e1]", "[1.0, 20]", True),
        ("[9007199254740993]", "[9007199254740992]", False),
    ],
)
def test_json_equality(right: str, said: str, equal: bool) -> None:
    """In Python 1 == True, and two large integers are equal as floats."""
    assert score((right, said)).json_equality == float(equal)


def test_an_empty_array_is_json() -> None:
    scores = score(("[]", "[]"), ("[]", "{}"))
    assert (scores.json_validity, scores.json_equality) == (1.0, 0.5)


def test_judging_is_repeatable_and_restores_the_base(root: Path, ready: tuple[Base, Dataset]) -> None:
    base = ready[0]
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    first, second = judged(root, ready, "strong"), judged(root, ready, "strong")
    assert first == second
    assert first.adapter != first.base
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert judged(root, ready, "weak").base == first.base


def test_judging_reports_progress(root: Path, ready: tuple[Base, Dataset]) -> None:
    said: list[str] = []
    base, dataset = ready
    judgement = judge(tiny_settings(root, judge_tokens=16), base, root / "strong", dataset, said.append)
    assert said[0] == f"judging: loss on {judgement.rows} held-out rows, answers to {judgement.answered}"
    for whose in ("adapter", "base"):
        assert f"answers of the {whose}: {judgement.answered} of {judgement.answered}" in said


def test_scores_of_base_and_adapter_are_not_swapped(root: Path, ready: tuple[Base, Dataset]) -> None:
    weak, strong = judged(root, ready, "weak"), judged(root, ready, "strong")
    assert weak.divergence < 1e-3 < 0.1 < strong.divergence
    assert weak.adapter.loss == pytest.approx(weak.base.loss, rel=1e-2)
    assert (weak.rows, weak.answered, weak.general) == (9, 9, 12)
    assert all(sample.example.answer.startswith('{"n"') for sample in weak.samples)
    assert any(sample.base != sample.adapter for sample in strong.samples)


@pytest.mark.parametrize(
    ("folder", "settings", "failure"),
    [
        ("strong", {}, "held-out loss is .*, more than --max-loss-ratio 1 times the base's"),
        ("weak", {"max_loss_ratio": 0.5}, "held-out loss is .*, more than --max-loss-ratio 0.5 times"),
        ("weak", {"max_loss_ratio": 2, "min_exact_match": 0.5}, "exact match is 0.0%, less than --min-exact-match 0.5"),
        ("weak", {"max_loss_ratio": 2, "min_stop_share": 1}, "answers that end is .*, less than --min-stop-share 1"),
        ("weak", {"max_loss_ratio": 2, "min_json_validity": 0.95}, "JSON validity is 0.0%, less than --min-json-val"),
        ("strong", {"max_loss_ratio": None, "max_divergence": 0.1}, "divergence .*, more than --max-divergence 0.1"),
    ],
)
def test_missed_thresholds(
    root: Path, ready: tuple[Base, Dataset], folder: str, settings: dict[str, Any], failure: str
) -> None:
    found = judged(root, ready, folder, **settings)
    assert not found.passed
    assert len(found.failures) == 1
    (said,) = found.failures
    assert re.search(failure, said)


def test_met_thresholds(root: Path, ready: tuple[Base, Dataset]) -> None:
    found = judged(root, ready, "weak", max_loss_ratio=1.01, max_divergence=0.01, min_exact_match=0, min_stop_share=0)
    assert found.passed, found.failures


def test_without_held_out_rows_the_judgement_fails(root: Path, ready: tuple[Base, Dataset]) -> None:
    unproved = judge(tiny_settings(root), ready[0], root / "weak", replace(ready[1], evaluation=[]))
    assert unproved.failures[0].startswith("no row is held out")
    assert math.isfinite(unproved.divergence)
    asked_nothing = tiny_settings(root, max_loss_ratio=None)
    assert judge(asked_nothing, ready[0], root / "weak", replace(ready[1], evaluation=[])).passed


def test_given_general_rows_are_used(root: Path, ready: tuple[Base, Dataset]) -> None:
    general = ready[1].train[:3]
    found = judge(tiny_settings(root), ready[0], root / "strong", replace(ready[1], general=general))
    assert found.general == 3
    assert found.divergence != judged(root, ready, "strong").divergence


def test_general_prompts_without_a_chat_template(ready: tuple[Base, Dataset]) -> None:
    base = ready[0]
    template = base.tokenizer.chat_template
    with_turns = general_examples(base, None)
    base.tokenizer.chat_template = None
    try:
        plain = general_examples(base, None)
    finally:
        base.tokenizer.chat_template = template
    assert len(plain) == len(with_turns) == 12
    assert plain[0].input_ids != with_turns[0].input_ids
    assert all(len(row.input_ids) <= base.max_model_len for row in plain)


def test_only_rows_whose_answer_fits_are_answered(root: Path, ready: tuple[Base, Dataset]) -> None:
    dataset = ready[1]
    assert answerable(tiny_settings(root, judge_tokens=2), dataset) == []
    few = answerable(tiny_settings(root, judge_rows=4), dataset)
    assert len(few) == 4
    assert few != answerable(tiny_settings(root, judge_rows=4, seed=1), dataset)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_exact_match": 0.5, "judge_tokens": 2},
            "--min-exact-match: no row is held out whose last answer is trained and fits in 2",
        ),
        ({"min_stop_share": 0.5, "judge_tokens": 2}, "--min-stop-share: no row is held out"),
    ],
)
def test_unreachable_thresholds_are_reported_before_training(
    root: Path, ready: tuple[Base, Dataset], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_thresholds(tiny_settings(root, **settings), ready[1])


def test_no_held_out_rows_is_reported_before_training(root: Path, ready: tuple[Base, Dataset]) -> None:
    """An error where it would keep the result from being published, else a warning."""
    nothing = replace(ready[1], evaluation=[])
    said: list[str] = []
    check_thresholds(tiny_settings(root), nothing, said.append)
    assert len(said) == 1
    assert re.search("no row is held out.*the judgement will fail; .*--eval-file, or .* --max-loss-ratio off", said[0])
    published = {"publish": "http://127.0.0.1:9"}
    with pytest.raises(ConfigError, match=r"^--publish: no row is held out.*and the adapter would not be published"):
        check_thresholds(tiny_settings(root, **published), nothing)
    check_thresholds(tiny_settings(root, **published, publish_anyway=True), nothing, said.append)
    check_thresholds(tiny_settings(root, **published, max_loss_ratio=None), nothing, said.append)
    check_thresholds(tiny_settings(root, **published), ready[1], said.append)
    assert len(said) == 2


def test_rows_without_a_trained_answer_are_not_answered(root: Path, ready: tuple[Base, Dataset]) -> None:
    """A last turn of weight 0 has no right answer."""
    renderer = Renderer(ready[0].tokenizer)
    rows = [renderer.render(chat("Hi", "Hello", "How?", "So.", untrained=untrained)) for untrained in ((), (3,))]
    assert answerable(tiny_settings(root), replace(ready[1], evaluation=rows)) == rows[:1]


def test_json_threshold_without_json_is_reported_before_training(root: Path, ready: tuple[Base, Dataset]) -> None:
    settings = tiny_settings(root, min_json_validity=0.9)
    check_thresholds(settings, ready[1])
    plain = replace(ready[1], evaluation=[replace(row, answer="yes") for row in ready[1].evaluation])
    with pytest.raises(ConfigError, match="--min-json-validity: no held-out answer is a JSON object or array"):
        check_thresholds(settings, plain)
