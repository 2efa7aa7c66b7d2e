"""The chart of docs/performance.md: drawn from the figures that the pages tell, for light and dark readers."""

import json
import re
from itertools import takewhile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtests.report.chart import DOCS, chart

FIGURES = json.loads((DOCS / "performance.json").read_text())


def test_the_chart_is_what_its_figures_make() -> None:
    assert (DOCS / "performance.svg").read_text() == chart(FIGURES), "run: python -m loadtests.report.chart"


@pytest.mark.parametrize("page", [DOCS / "performance.md", DOCS.parent / "README.md"])
def test_the_tables_tell_the_same_figures(page: Path) -> None:
    lines = page.read_text().splitlines()
    header = next(at for at, line in enumerate(lines) if line.startswith("|") and FIGURES["servers"][1] in line)
    table = list(takewhile(lambda line: line.startswith("|"), lines[header:]))
    for work, values in FIGURES["work"].items():
        name = re.compile(rf"\| {re.escape(work)}(, 16 slots)?(, 16 concurrent)? \|")
        rows = [line for line in table if name.match(line)]
        (cells,) = [[cell.strip() for cell in line.split("|")[2:-1]] for line in rows]
        assert [cell.split()[0] for cell in cells] == [str(value) for value in values]


def test_it_says_what_unit_where_and_for_whom() -> None:
    drawn = chart(FIGURES)
    ElementTree.fromstring(drawn)
    for said in (FIGURES["title"], "tokens/s", "Xeon", "AMX", "2026-", "prefers-color-scheme: dark", *FIGURES["work"]):
        assert said in drawn


def test_bars_are_in_proportion() -> None:
    figures = {**FIGURES, "servers": ["one", "other"], "work": {"w": [100, 50]}, "marked": {}}
    assert [int(width) for width in re.findall(r'class="bar\d" x="170" y="\d+" width="(\d+)"', chart(figures))][1:] == [
        510, 255,
    ]  # fmt: skip
