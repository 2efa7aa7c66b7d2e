"""The data report and its warnings."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from tests.tiny import tiny_tokenizer
from tests.training.rows import chat, question, write_rows
from training.data.data_report import DataReport, render, show
from training.data.dataset import build_dataset
from training.data.rendering import Renderer
from training.settings import TrainSettings

TOKENIZER = tiny_tokenizer()
CITIES = [{"instruction": f"Which city is number {n}?", "output": f"City{n * n}"} for n in range(40)]


def report(folder: Path, rows: Iterable[Mapping[str, Any]], **settings: Any) -> DataReport:
    path = write_rows(folder / "rows.jsonl", rows)
    return build_dataset(TrainSettings(data=(str(path),), name="test", **settings), TOKENIZER, 2048).report


def printed(*things: RenderableType) -> str:
    out = io.StringIO()
    for thing in things:
        Console(file=out, width=120).print(thing)
    return out.getvalue()


def test_report_lists_files_rows_and_tokens(tmp_path: Path) -> None:
    rows = [*map(question, range(150)), question(7), {"instruction": "Say it.", "output": "x" * 900}]
    said = printed(render(report(tmp_path, rows, max_length=256)))
    assert "135 rows to train on, 15 held out" in said
    assert "left out: 1 duplicate, 1 too long" in said or "left out: 1 too long, 1 duplicate" in said
    assert "rows.jsonl   alpaca   152" in said
    assert "####" in said


def test_report_counts_are_correct(tmp_path: Path) -> None:
    counted = report(tmp_path, [question(index) for index in range(5)])
    text = "<|im_start|>user\nWhat is 1 and 1?<|im_end|>\n<|im_start|>assistant\nIt is 2.<|im_end|>\n"
    length = len(TOKENIZER(text).input_ids)
    assert (counted.tokens, counted.trained_tokens) == (5 * length, 5 * len("It is 2.") + 5)
    assert counted.histogram() == [(length, length, 5)]
    assert counted.counts()["files"] == [{"file": "rows.jsonl", "format": "alpaca", "rows": 5}]


def test_every_length_is_in_one_histogram_bar(tmp_path: Path) -> None:
    rows = [{"text": "x" * length} for length in (1, 2, 50, 51, 52, 99, 400)]
    counted = report(tmp_path, rows)
    bins = counted.histogram()
    assert len(bins) <= 8
    assert [rows for *_, rows in bins] == [sum(a <= length <= b for length in counted.lengths) for a, b, _ in bins]
    assert sum(rows for *_, rows in bins) == 7


def told(report: DataReport, *words: str) -> bool:
    return any(all(word in advice for word in words) for advice in report.advice)


def test_warning_for_few_rows(tmp_path: Path) -> None:
    assert told(report(tmp_path, CITIES), "Only 36 rows")
    assert not told(report(tmp_path, map(question, range(150))), "below 100")


def test_warning_for_rows_of_facts(tmp_path: Path) -> None:
    assert told(report(tmp_path, CITIES), "retrieval")


@pytest.mark.parametrize(
    "answer", [lambda n: f'{{"n": {n}}}', lambda n: ["yes", "no"][n % 2], lambda n: f"A longer answer about {n}, " * 3]
)
def test_no_warning_for_rows_of_behaviour(tmp_path: Path, answer: Any) -> None:
    assert not told(report(tmp_path, [{**row, "output": answer(n)} for n, row in enumerate(CITIES)]), "retrieval")


def test_warning_for_one_answer_to_most_rows(tmp_path: Path) -> None:
    rows = [{**row, "output": "no" if n % 4 else f"yes, {n}"} for n, row in enumerate(CITIES)]
    assert told(report(tmp_path, rows), "answers are the same ('no')")
    assert not told(report(tmp_path, CITIES), "are the same")


def test_warning_for_answers_without_an_end_token(tmp_path: Path) -> None:
    rows = [*CITIES, *({"instruction": f"Go on {n}", "output": "on and on " * 20} for n in range(10))]
    assert told(report(tmp_path, rows, max_length=128, too_long="truncate"), "10 of 50 rows are cut", "not to stop")
    assert told(report(tmp_path, rows, max_length=128), "10 of 50 rows exceed 128 tokens and are left out")


def test_warning_for_lengths_near_the_limit(tmp_path: Path) -> None:
    longest = max(report(tmp_path, CITIES).lengths)
    assert told(report(tmp_path, CITIES, max_length=longest), "within 10% of the limit")
    assert not told(report(tmp_path, CITIES), "within 10%")


def test_warning_for_few_trained_tokens(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n} " * 400, "output": "yes"} for n in range(10, 30)]
    assert told(report(tmp_path, rows, max_length=2000), "of the tokens are trained")


def test_warning_for_unused_fields(tmp_path: Path) -> None:
    assert told(report(tmp_path, [{**row, "source": "web", "id": 3} for row in CITIES]), "not used: id, source")


def printed_example(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system="standard" if terminal else None, width=40)
    show([Renderer(TOKENIZER).render(chat("Hi [bold]\x1b[31m", "Hello,\nyou"))], TOKENIZER, console)
    return out.getvalue()


def test_trained_tokens_are_marked_where_there_are_no_colours() -> None:
    said = printed_example(terminal=False)
    assert "trained tokens are between >>> and <<<" in said
    assert ">>>Hello,\nyou<|im_end|><<<" in said
    assert "Hi [bold]\\x1b[31m<|im_end|>" in said, "data neither styles nor steers the terminal"
    assert "\x1b" not in said


def test_trained_tokens_are_green_on_a_terminal() -> None:
    said = printed_example(terminal=True)
    assert "\x1b[32mHello,\x1b[0m\n\x1b[32myou<|im_end|>\x1b[0m" in said
    assert "\x1b[31m" not in said
    assert ">>>" not in said
