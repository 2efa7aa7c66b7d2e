"""The files of a training record as anybody may have written them: what is read can be shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.format.training_record import (
    HEAD_BYTES,
    LOG,
    MAX_BYTES,
    SAMPLES,
    TrainingLog,
    read_log,
    read_manifest,
    read_samples,
)

LINE = '{"time":1,"step":1,"loss":2}\n'
ODD = ["1e999", "-1e999", "NaN", "Infinity", "9" * 400, "-" + "9" * 19, "1" * 5000, '"1e999"', "[1]", "{}", "null"]
VALUES = st.recursive(
    st.sampled_from(ODD) | st.floats().map(json.dumps) | st.integers().map(json.dumps) | st.text().map(json.dumps),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    max_leaves=5,
)
NAMES = st.sampled_from(["time", "step", "loss", "eval_loss", "learning_rate", "event", "reason", "steps"])
LINES = st.dictionaries(NAMES, VALUES | st.just('"started"'), max_size=6)


def shown(log: TrainingLog) -> dict[str, Any]:
    """Return what a server shows of a log, as its answer has it."""
    times = [None if time is None else int(time) for time in (log.first_time, log.last_time)]
    answer = {"step": log.step, "times": times, "started": log.started, "reason": log.reason, **log.curves()}
    parsed: dict[str, Any] = json.loads(json.dumps(answer, allow_nan=False))
    return parsed


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINES, max_size=4))
def test_whatever_a_log_says_it_can_be_shown(tmp_path: Path, lines: list[dict[str, str]]) -> None:
    rows = ["{" + ",".join(f'"{name}":{value}' for name, value in line.items()) + "}\n" for line in lines]
    (tmp_path / LOG).write_text("".join(rows))
    log = read_log(tmp_path)
    assert log is not None
    assert log.skipped_lines <= len(lines)
    answer = shown(log)
    for name in ("loss", "evaluation", "learning_rate"):
        steps = [step for step, _ in answer[name]]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    "line",
    [
        b'{"time":1,"step":1,"loss":NaN}',
        b'{"time":1,"step":1,"loss":1e999}',
        b'{"time":1e999,"step":1,"loss":1}',
        b'{"time":1,"step":1e999,"loss":1}',
        b'{"step":1,"loss":2}',
        b'{"time":1,"step":"x","loss":2}',
        b"[1]",
        b'{"time":1,"event":"started"}',
        b'{"time":1,"event":7}',
        b"\xff",
        b"",
        b"[" * 100_000,
        b'{"time":1,"event":"started","step":0,"settings":' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_a_bad_line_hides_no_other(tmp_path: Path, line: bytes) -> None:
    (tmp_path / LOG).write_bytes(LINE.encode() + line + b'\n{"time":3,"step":2,"loss":4}\n')
    log = read_log(tmp_path)
    assert log is not None
    assert (log.loss, log.skipped_lines, log.skipped_bytes) == ([(1, 2.0), (2, 4.0)], 1, 0)
    assert (log.first_time, log.last_time, log.event) == (1, 3, None)


@pytest.mark.parametrize("more", [0, 1, 7, 20, 30, 33, 34, 35, 36])
def test_where_a_long_log_is_cut_no_line_is_torn(tmp_path: Path, more: int) -> None:
    size = len('{"time":1,"step":100000,"loss":2}\n')
    count = (MAX_BYTES[LOG] + HEAD_BYTES) // size
    first = f'{{"time":1,"event":"started","step":0,"note":"{"x" * more}"}}\n'
    text = first + "".join(f'{{"time":1,"step":{100_000 + step},"loss":2}}\n' for step in range(count))
    (tmp_path / LOG).write_text(text)
    log = read_log(tmp_path)
    assert log is not None
    steps = [step for step, _ in log.loss]
    assert (steps[0], steps[-1], log.skipped_lines) == (100_000, 99_999 + count, 0)
    assert log.skipped_bytes == (count - len(steps)) * size
    over = len(text) - MAX_BYTES[LOG]
    assert over <= log.skipped_bytes <= over + 2 * size


@pytest.mark.parametrize("value", ["1e999", "NaN", "9" * 400, "[" * 70 + "]" * 70, '{"a": [-1e999]}'])
def test_samples_and_a_manifest_that_others_cannot_read_are_none(tmp_path: Path, value: str) -> None:
    (tmp_path / SAMPLES).write_text(f"[{value}]")
    (tmp_path / "manylora.json").write_text(f'{{"a": {value}}}')
    assert read_samples(tmp_path) is None
    assert read_manifest(tmp_path) is None
