"""The tables of ``docs/openai.md``, and the tests that they name."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "openai.md"


def table(heading: str, page: Path = PAGE) -> list[list[str]]:
    """Return the cells of the first table under ``## heading`` of ``page``, without its head."""
    section = page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = section.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def is_test(reference: str) -> bool:
    """Return whether ``reference``, as in ``api/generation/test_models.py::test_pages``, is a test under ``tests/``."""
    path, _, name = reference.partition("::")
    return name in _functions(path)


@cache
def _functions(path: str) -> frozenset[str]:
    file = ROOT / "tests" / path
    if not file.is_file():
        return frozenset()
    nodes = ast.walk(ast.parse(file.read_text()))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
