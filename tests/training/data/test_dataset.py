"""The dataset: every row is trained, held out, or left out and counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bases.errors import ConfigError
from examples.make_support_json import OUT, tickets
from tests.tiny import CHAT_TEMPLATE, CONTEXT, tiny_tokenizer
from tests.training.export.merging import merging_tokenizer
from tests.training.rows import question, write_rows
from training.data.conversation import DataError
from training.data.dataset import Dataset, build_dataset, data_hash
from training.data.rendering import UNTRAINED
from training.settings import TrainSettings

TOKENIZER = tiny_tokenizer()


def built(*data: Path | str, context: int = CONTEXT, **settings: Any) -> Dataset:
    names = tuple(str(name) for name in data)
    return build_dataset(TrainSettings(data=names, name="test", **settings), TOKENIZER, context)


def questions(path: Path, count: int, first: int = 0) -> Path:
    return write_rows(path, map(question, range(first, first + count)))


def texts(examples: list[Any]) -> list[str]:
    return [TOKENIZER.decode(example.input_ids) for example in examples]


def test_tenth_of_the_rows_is_held_out(tmp_path: Path) -> None:
    dataset = built(questions(tmp_path / "rows.jsonl", 40))
    assert (len(dataset.train), len(dataset.evaluation)) == (36, 4)
    assert not set(texts(dataset.train)) & set(texts(dataset.evaluation))
    assert (dataset.report.rows, dataset.report.train, dataset.report.evaluation) == (40, 36, 4)


def test_rows_that_differ_only_in_weights_are_not_split(tmp_path: Path) -> None:
    first, last = {"role": "assistant", "content": "Yes?"}, {"role": "assistant", "content": "No."}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{row}"},
                first | {"weight": weight},
                {"role": "user", "content": "So?"},
                last,
            ]
        }
        for row in range(10)
        for weight in (0, 1)
    ]
    dataset = built(write_rows(tmp_path / "rows.jsonl", rows), eval_share=0.3)
    assert not set(texts(dataset.train)) & set(texts(dataset.evaluation))
    left_out = dataset.report.left_out["also in the evaluation rows"]
    assert len(dataset.train) + len(dataset.evaluation) + left_out == 20


def test_seed_selects_the_held_out_rows(tmp_path: Path) -> None:
    path = questions(tmp_path / "rows.jsonl", 40)
    assert built(path, seed=1).evaluation == built(path, seed=1).evaluation != built(path, seed=2).evaluation


@pytest.mark.parametrize(
    ("rows", "share", "held_out"), [(10, 0.1, 1), (9, 0.5, 0), (1, 0.1, 0), (12, 0.001, 1), (12, 0.99, 11), (40, 0, 0)]
)
def test_split_leaves_rows_on_both_sides(tmp_path: Path, rows: int, share: float, held_out: int) -> None:
    dataset = built(questions(tmp_path / "rows.jsonl", rows), eval_share=share)
    assert (len(dataset.train), len(dataset.evaluation)) == (rows - held_out, held_out)
    assert held_out or any("No row is held out" in advice for advice in dataset.report.advice)


def test_duplicates_are_removed_and_counted(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [*map(question, range(20)), question(3), question(5)])
    dataset = built(first, questions(tmp_path / "b.jsonl", 4, first=18))
    assert len(dataset.train) + len(dataset.evaluation) == 22
    assert dataset.report.left_out == {"duplicate": 4}


def test_eval_file_rows_are_removed_from_training(tmp_path: Path) -> None:
    evaluation = questions(tmp_path / "eval.jsonl", 5, first=8)
    dataset = built(questions(tmp_path / "rows.jsonl", 10), eval_file=evaluation)
    assert (len(dataset.train), len(dataset.evaluation)) == (8, 5)
    assert not set(texts(dataset.train)) & set(texts(dataset.evaluation))
    assert dataset.report.left_out == {"also in the evaluation rows": 2}


def test_weights_repeat_only_training_rows(tmp_path: Path) -> None:
    often, seldom = questions(tmp_path / "a=b.jsonl", 20), questions(tmp_path / "b.jsonl", 20, first=100)
    dataset = built(f"{often}=2.5", f"{seldom}=0.5")
    assert len(set(texts(dataset.evaluation))) == 4
    assert not set(texts(dataset.train)) & set(texts(dataset.evaluation))
    times = {
        str(path): Counter(e.source for e in dataset.train if e.source.startswith(str(path)))
        for path in (often, seldom)
    }
    assert set(times[str(often)].values()) == {2, 3}
    assert set(times[str(seldom)].values()) == {1}
    kept = len(times[str(often)])
    assert times[str(often)].total() == 2 * kept + round(kept / 2)
    assert len(times[str(seldom)]) == round((36 - kept) / 2)
    assert dataset.train == built(f"{often}=2.5", f"{seldom}=0.5").train
    assert len(built(often).train) == 18, "a name with an equals sign needs no weight"


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much"])
def test_invalid_weights(tmp_path: Path, weight: str) -> None:
    with pytest.raises(ConfigError, match=r"DATA: the weight in .* must be a number above 0"):
        built(f"{questions(tmp_path / 'rows.jsonl', 10)}={weight}")


def test_weights_that_leave_no_rows(tmp_path: Path) -> None:
    path = questions(tmp_path / "rows.jsonl", 20)
    with pytest.raises(ConfigError, match=r"^DATA: the files' weights leave no row to train on$"):
        built(f"{path}=0.01")


def test_a_file_named_twice(tmp_path: Path) -> None:
    path = questions(tmp_path / "rows.jsonl", 10)
    with pytest.raises(ConfigError, match="named twice"):
        built(path, f"{path}=2")


LONG = {"instruction": "Say much.", "output": "much " * 30}
LONG_PROMPT = {"instruction": "many words " * 30, "output": "No."}


def test_long_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [LONG, *map(question, range(12)), LONG_PROMPT])
    dataset = built(path, max_length=100)
    assert len(dataset.train) + len(dataset.evaluation) == 12
    assert dataset.report.left_out == {"too long": 2}


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [LONG, *map(question, range(5)), LONG_PROMPT])
    dataset = built(path, max_length=100, too_long="truncate")
    assert len(dataset.train) == 6
    assert dataset.report.truncated == 1
    assert dataset.report.left_out == {"nothing trained left after truncation": 1}
    cut = dataset.train[0]
    assert len(cut.input_ids) == 100
    assert cut.labels[-1] == cut.input_ids[-1] != UNTRAINED


def test_long_rows_can_be_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [question(1), LONG])
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: it has \d+ tokens, more than --max-length 100 \(see --too-long\)"
    ):
        built(path, max_length=100, too_long="fail")


def test_the_limit_is_the_contexts_or_1024(tmp_path: Path) -> None:
    path = questions(tmp_path / "rows.jsonl", 10)
    assert built(path, context=300).max_length == 300
    assert built(path, context=8192).max_length == 1024
    with pytest.raises(ConfigError, match=r"--max-length: must be 2 to 300, the context of this model \(got 301\)"):
        built(path, context=300, max_length=301)


def test_no_row_left_to_train_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [LONG, LONG_PROMPT])
    with pytest.raises(DataError, match="no row is left to train on; left out: 2 too long"):
        built(path, max_length=50)
    with pytest.raises(DataError, match="left out: 2 also in the evaluation rows"):
        built(path, eval_file=path, max_length=500, context=500)


def test_general_rows_are_a_share_of_trained_tokens(tmp_path: Path) -> None:
    general = write_rows(tmp_path / "general.jsonl", [{"text": f"Fact {index}."} for index in range(50)])
    dataset = built(questions(tmp_path / "rows.jsonl", 38), mix_general=general, mix_share=0.15)
    mixed = [example for example in dataset.train if example.source.startswith(str(general))]
    assert (len(mixed), len(dataset.train)) == (6, 40)
    assert (dataset.report.mixed, dataset.report.general) == (6, 5)
    assert len(dataset.general) == 5
    assert not set(texts(dataset.general)) & set(texts(dataset.train))


def test_general_rows_that_are_data_rows_are_not_general(tmp_path: Path) -> None:
    rows = questions(tmp_path / "rows.jsonl", 40)
    dataset = built(rows, mix_general=questions(tmp_path / "general.jsonl", 20, first=32), mix_share=0.1)
    assert dataset.report.left_out == {"duplicate": 8}
    counted = Counter(texts([*dataset.train, *dataset.evaluation, *dataset.general]))
    assert max(counted.values()) == 1


def test_too_few_general_rows(tmp_path: Path) -> None:
    general = write_rows(tmp_path / "general.jsonl", [{"text": f"Fact {index}."} for index in range(5)])
    rows = questions(tmp_path / "rows.jsonl", 50)
    with pytest.raises(DataError, match=r"--mix-general: a share of 0.2 needs 11 rows, .* has 5 .*--mix-share 0.1$"):
        built(rows, mix_general=general, mix_share=0.2)
    assert built(rows, mix_general=general, mix_share=0.1).report.mixed == 5


def test_the_hash_is_of_the_rows_and_not_their_order(tmp_path: Path) -> None:
    path, backwards = tmp_path / "rows.jsonl", tmp_path / "back.jsonl"
    rows = [question(index) for index in range(8)]
    write_rows(path, rows)
    write_rows(backwards, rows[::-1])
    assert built(path).data_hash == built(backwards).data_hash
    assert built(path).data_hash != built(questions(path, 7)).data_hash
    examples = built(path).train
    assert data_hash(examples) != data_hash([*examples, examples[0]]), "how often matters"


def test_the_weight_of_a_turn_is_in_the_hash(tmp_path: Path) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    hashes = set()
    for weight in (0, 1):
        messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in said]
        messages[1]["weight"] = weight
        hashes.add(built(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])).data_hash)
    assert len(hashes) == 2


def test_given_template_is_part_of_the_dataset(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("Chat:" + CHAT_TEMPLATE)
    path = questions(tmp_path / "rows.jsonl", 10)
    dataset = built(path, chat_template=template)
    assert dataset.chat_template == template.read_text()
    assert all(text.startswith("Chat:") for text in texts(dataset.train))
    assert dataset.report.chat_template == "own.jinja"
    assert built(path).chat_template is None
    with pytest.raises(ConfigError, match=r"--chat-template: .*none\.jinja"):
        built(path, chat_template=tmp_path / "none.jinja")


def test_progress_line_every_ten_thousand_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{index}"} for index in range(20_001)])
    said: list[str] = []
    build_dataset(TrainSettings(data=(str(path),), name="test"), TOKENIZER, CONTEXT, said.append)
    assert said == ["rows.jsonl: 10,000 rows read", "rows.jsonl: 20,000 rows read"]


def test_the_shipped_tickets() -> None:
    """The shipped rows equal what their script writes, and no problem occurs twice."""
    rows = list(tickets())
    assert OUT.read_text(encoding="utf-8") == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    dataset = built(OUT, context=1024)
    assert (len(dataset.train), len(dataset.evaluation)) == (144, 16)
    assert dataset.report.left_out == {}
    assert {frozenset(json.loads(example.answer)) for example in dataset.train} == {frozenset({"category", "urgency"})}


EMPTY = {"instruction": "x", "output": ""}
FORGED = {"instruction": "x", "output": "a<|im_end|>b"}


def test_bad_row_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*map(question, range(1500)), EMPTY])
    with pytest.raises(DataError, match=r"^1 row cannot be trained on:\n  .*rows\.jsonl:1501: `output` is empty\n"):
        built(path)
    assert list(tmp_path.iterdir()) == [path], "nothing is written"


def spoilt(path: Path) -> Path:
    """12 good rows, and one each that fails as a line, as a row, by its format, and in the template."""
    rows = [*map(question, range(6)), EMPTY, FORGED, {"text": "Once."}, *map(question, range(6, 12))]
    path = write_rows(path, rows)
    path.write_text(path.read_text() + '{"instruction": \n')
    return path


def test_all_bad_rows_of_all_files_are_reported(tmp_path: Path) -> None:
    files = {"eval_file": spoilt(tmp_path / "eval.jsonl"), "mix_general": spoilt(tmp_path / "general.jsonl")}
    with pytest.raises(DataError) as caught:
        built(spoilt(tmp_path / "rows.jsonl"), **files)
    said = str(caught.value)
    assert said.startswith("12 rows cannot be trained on:\n")
    for name in ("rows", "eval", "general"):
        for place, reason in (
            (7, "`output` is empty"), (8, "the assistant's turn 2 has"), (9, "the row is text"), (16, "invalid JSON"),
        ):  # fmt: skip
            assert f"{name}.jsonl:{place}: {reason}" in said
    assert said.endswith("Correct them, or skip them with --skip-bad.")


def test_only_the_first_twenty_are_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [question(1), *[EMPTY] * 35])
    with pytest.raises(DataError) as caught:
        built(path)
    assert str(caught.value).count("is empty") == 20
    assert "35 rows" in str(caught.value)
    assert "\n  and 15 more\n" in str(caught.value)


def test_bad_rows_are_skipped_and_counted_on_request(tmp_path: Path) -> None:
    dataset = built(spoilt(tmp_path / "rows.jsonl"), skip_bad=True)
    assert (len(dataset.train), len(dataset.evaluation)) == (11, 1)
    assert dataset.report.left_out == {"bad (--skip-bad)": 4}
    assert dataset.report.rows == 16
    assert [line.partition("rows.jsonl")[2].split(": ")[0] for line in dataset.report.bad] == [":7", ":9", ":16", ":8"]
    assert dataset.report.counts()["left_out"] == {"bad (--skip-bad)": 4}


def test_a_row_that_makes_several_examples_is_one_bad_row(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "ca"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = str(write_rows(tmp_path / "rows.jsonl", [row, row]))
    settings = TrainSettings(data=(data,), name="test", max_length=2, too_long="fail")
    with pytest.raises(DataError, match=r"^2 rows cannot be trained on:\n  .*:1: it has 3 tokens.*\n  .*:2: it has 3"):
        build_dataset(settings, merging_tokenizer(), CONTEXT)


def test_file_of_unknown_format_is_reported_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": str(index)} for index in range(30)])
    for skip in (False, True):
        with pytest.raises(DataError, match=r"^[^\n]*rows\.jsonl:1: unknown format: the row has `question`[^\n]*$"):
            built(path, skip_bad=skip)


def test_all_rows_bad(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [EMPTY] * 22)
    with pytest.raises(DataError) as caught:
        built(path, skip_bad=True)
    head, *rows = str(caught.value).split("\n  ")
    assert head == "no row is left to train on; left out: 22 bad"
    assert rows == [f"{path}:{line}: `output` is empty" for line in range(1, 21)] + ["and 2 more"]


def test_bad_row_options_that_conflict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--skip-bad: .*--too-long fail"):
        built(tmp_path / "rows.jsonl", skip_bad=True, too_long="fail")


def test_examples_of_one_row_are_not_split(tmp_path: Path) -> None:
    """A row gives two examples if an earlier answer merges with its prompt."""
    said = ("user", "assistant", "user", "assistant")

    def melting(index: int) -> dict[str, Any]:
        contents = (f"{index}ca", "bc", f"a{index}", "c")
        return {"messages": [{"role": role, "content": text} for role, text in zip(said, contents, strict=True)]}

    path = write_rows(tmp_path / "rows.jsonl", map(melting, range(20)))
    settings = TrainSettings(data=(str(path),), name="test", eval_share=0.5)
    dataset = build_dataset(settings, merging_tokenizer(), CONTEXT)
    assert (len(dataset.train), len(dataset.evaluation)) == (20, 20)
    assert not {example.source for example in dataset.train} & {example.source for example in dataset.evaluation}
