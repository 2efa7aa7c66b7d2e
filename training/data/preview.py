"""Examines a data file for a server, in a process of its own: the report, and rows as the model sees them.

    python -m training.data.preview < request

The request is a JSON object with the fields of :class:`Preview`; the answer, JSON too, goes to standard output. A
file that cannot be trained on is answered with ``{"error": ...}``.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bases.errors import ConfigError
from training.data.conversation import DataError
from training.data.data_report import DataReport, printable
from training.data.dataset import build_dataset
from training.data.rendering import UNTRAINED, Example
from training.data.row_errors import LEFT_OUT
from training.settings import TrainSettings

MAX_MEMORY = 8 << 30
"""Bytes of address space."""


@dataclass(frozen=True)
class Preview:
    """What to examine. The file lies in the working directory, so that the report names it without a folder."""

    file: str
    tokenizer: str
    """Folder of the base's tokenizer."""
    max_model_len: int
    rows: int
    """Number of rows to return."""
    cpu_seconds: int
    options: dict[str, Any]
    """Options of ``manylora train``."""


def preview(asked: Preview) -> dict[str, Any]:
    """Return the report and the rows. Raises DataError or ConfigError."""
    tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(asked.tokenizer))
    # "./": a name may begin with ~.
    settings = TrainSettings(data=(f"./{asked.file}",), name="preview", skip_bad=True, **asked.options)
    dataset = build_dataset(settings, tokenizer, asked.max_model_len)
    shown = islice(dataset.train, asked.rows)
    return {"report": report_json(dataset.report), "rows": [row_json(example, tokenizer) for example in shown]}


def report_json(report: DataReport) -> dict[str, Any]:
    """Return a report as JSON values."""
    return {
        **report.counts(),
        "files": [
            {
                "file": file.file,
                "format": file.format,
                "rows": file.rows,
                "kept": file.kept,
                "unused_fields": sorted(file.unused),
            }
            for file in report.files
        ],
        "rows": report.rows,
        "trained_share": report.trained_share,
        "left_out": {_reason(reason): count for reason, count in report.left_out.items()},
        "bad": [printable(line) for line in report.bad],
        "histogram": [{"from": low, "to": high, "rows": rows} for low, high, rows in report.histogram()],
        "advice": report.advice,
    }


def row_json(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a row as the model sees it."""
    return {
        "source": example.source,
        "tokens": len(example.input_ids),
        "trained": example.trained,
        "spans": list(_spans(example, tokenizer)),
    }


def _spans(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    pairs = zip(example.input_ids, example.labels, strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1] != UNTRAINED):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        yield {"text": str(text), "trained": trained}


def _reason(reason: str) -> str:
    return "bad" if reason == LEFT_OUT else reason  # no option leaves them out here


def main() -> None:
    """Answer one request."""
    asked = Preview(**json.load(sys.stdin))
    for limit, value in ((resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_CPU, asked.cpu_seconds)):
        resource.setrlimit(limit, (value, value))
    os.nice(10)  # what the server answers meanwhile comes first
    try:
        answer = preview(asked)
    except (DataError, ConfigError) as error:
        answer = {"error": printable(str(error))}
    json.dump(answer, sys.stdout, allow_nan=False)


if __name__ == "__main__":
    main()
