"""The examples run as they are, against a server of the demo model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.live import Live

pytestmark = pytest.mark.demo

ROOT = Path(__file__).parents[3]


def run(live: Live, *words: str) -> str:
    """Run an example and return what it prints."""
    environment = {**os.environ, "OPENAI_BASE_URL": f"{live.http.base_url}/v1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rag_cites_sentences_that_are_there(demo: Live) -> None:
    printed = run(demo, "examples/rag/rag.py", "What does a library card cost?", "When does the sun rise?")
    library = " ".join((ROOT / "examples/rag/library.md").read_text(encoding="utf-8").split())
    quoted = [line.strip() for line in printed.splitlines() if line.endswith("]")]
    assert len(quoted) == 2
    for line in quoted:
        sentence, _, source = line.rpartition(" [")
        assert sentence.strip('"') in library
        assert source.removesuffix("]") in library
    assert quoted[0] == '"A library card costs 12 euros a year." [Becoming a member]'


def test_tool_loop(demo: Live) -> None:
    printed = run(demo, "examples/tool_loop.py")
    assert printed.count(") -> ") >= 4, "each question leads to a call"
    assert 'order_status({"order": 4711}) -> Order 4711, a lamp' in printed


@pytest.mark.slow
def test_extraction_trains_its_adapter(demo: Live) -> None:
    printed = run(demo, "examples/extraction/extract.py")
    rows = {line[:22].strip(): line[22:].split() for line in printed.splitlines() if line[22:].count("/") == 3}
    assert rows["base, schema"][0] == rows["adapter, schema"][0] == "16/16"
    right = {name: int(scores[1].split("/")[0]) for name, scores in rows.items()}
    assert right["adapter, schema"] > right["base, schema"]
