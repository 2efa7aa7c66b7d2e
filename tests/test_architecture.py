"""The rules between the rooms, read from the source: who imports whom, and how large the core may grow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"adapters", "bases", "server", "training", "loadtests", "manylora"}
CORE = (
    "engine/sequence",
    "engine/block_pool",
    "engine/slots",
    "engine/waiting/fairness",
    "engine/waiting/turns",
    "engine/waiting/deadlines",
    "engine/waiting/admission",
    "engine/scheduler",
    "engine/commit",
    "compute/backend",
    "compute/attention",
    "compute/layers",
    "compute/lora_mapping",
    "compute/pool",
    "compute/reference/lora",
    "compute/reference/attention",
    "engine/sampling/sampler",
    "engine/runner",
    "engine/loader",
    "engine/residency",
    "engine/engine",
)
CORE_LINES = (
    3900  # 2,500 before speculation, 2,550 before log probabilities, pooling and grammars, 2,850 before fairness, 3,560
    # before turns were kept in order, 3,760 before the engine and the residency of adapters had a file each
)

FORBIDDEN = {
    "adapters": {
        "bases",
        "server",
        "training",
        "loadtests",
        "manylora",
        "fastapi",
        "starlette",
        "uvicorn",
        "transformers",
        "peft",
    },
    "bases": {"server", "training", "loadtests", "manylora", "fastapi", "peft"},
    "server": {"training", "loadtests", "manylora", "peft"},
    "training": {"server", "loadtests", "manylora", "fastapi"},
    "loadtests": OURS - {"loadtests"},
}
"""Room -> top-level packages it must not import."""
SHARED = (
    "bases.errors",
    "bases.extras",
    "bases.interrupts",
    "bases.command_line",
    "bases.machine",
    "bases.gguf_layout",
    "bases.pydantic_errors",
)
"""Modules without torch that every room may import."""
INSIDERS = "loadtests/micro/"
"""Benchmarks of one part, which import it; the other load tests use HTTP alone."""

INSIDE = {
    "grammar": set(),
    "sequence": {"grammar"},
    "block_pool": {"sequence"},
    "slots": {"sequence"},
    "prompt_lookup": set(),
    "speculation": {"sequence", "prompt_lookup"},
    "waiting/fairness": {"sequence"},
    "waiting/deadlines": {"sequence"},
    "waiting/turns": {"waiting.fairness"},
    "waiting/admission": {"sequence", "slots", "waiting.fairness", "waiting.turns"},
    "scheduler": {
        *("sequence", "block_pool", "slots", "speculation"),
        *("waiting.fairness", "waiting.deadlines", "waiting.admission"),
    },
    "commit": {"sequence", "block_pool", "grammar", "scheduler", "waiting.fairness"},
}
"""Module of ``server/engine`` that knows no torch -> modules of it that it may import, besides ``server.errors``."""


def imports(file: Path) -> Iterator[str]:
    """Dotted name of each import anywhere in a file, functions included."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_no_room_above_it(room: str) -> None:
    for file in sorted((ROOT / room).rglob("*.py")):
        if file.relative_to(ROOT).as_posix().startswith(INSIDERS):
            continue
        names = (name for name in imports(file) if not name.startswith(SHARED))
        wrong = {name for name in names if name.partition(".")[0] in FORBIDDEN[room]}
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", INSIDE)
def test_the_scheduling_core_knows_no_torch(module: str) -> None:
    allowed = ("server.errors", *(f"server.engine.{other}." for other in INSIDE[module]))
    for name in imports(ROOT / "server" / "engine" / f"{module}.py"):
        top = name.partition(".")[0]
        assert top not in {"torch", "transformers", "numpy"}, f"{module} imports {name}"
        assert top != "server" or name.startswith(allowed), f"{module} imports {name}"


def test_the_engine_knows_nothing_of_text_or_http() -> None:
    for module in CORE:
        for name in imports(ROOT / "server" / f"{module}.py"):
            assert not name.startswith(("server.api", "server.text", "server.metrics", "fastapi", "starlette")), module


WAYS = tuple(f"server.compute.{name}" for name in ("cpu", "cuda", "reference"))
ABOVE_THE_SEAM = {
    *("server/doctor.py", "server/api/serve.py", "server/ray/replica.py", "server/engine/sampling/sampler.py"),
}
"""What may name a way of computing: doctor says what the kernels can do, a start returns memory, and the sampler's own
arithmetic is the reference's."""


def test_nothing_above_the_seam_asks_which_way_of_computing_is_at_work() -> None:
    for file in sorted((ROOT / "server").rglob("*.py")):
        path = file.relative_to(ROOT)
        if path.is_relative_to("server/compute") or path.as_posix() in ABOVE_THE_SEAM:
            continue
        assert not [name for name in imports(file) if name.startswith(WAYS)], path


@pytest.mark.parametrize("way", ["cpu", "cuda", "reference"])
def test_a_way_of_computing_knows_the_reference_and_no_other(way: str) -> None:
    known = (f"server.compute.{way}", "server.compute.reference")
    for file in sorted((ROOT / "server" / "compute" / way).rglob("*.py")):
        others = [name for name in imports(file) if name.startswith(WAYS) and not name.startswith(known)]
        assert not others, f"{file.relative_to(ROOT)} imports {others}"


def test_computing_knows_nothing_of_what_asks_for_it() -> None:
    allowed = ("server.compute", "server.engine.sequence", "server.engine.slots")
    for file in sorted((ROOT / "server" / "compute").rglob("*.py")):
        others = [name for name in imports(file) if name.startswith("server.") and not name.startswith(allowed)]
        assert not others, f"{file.relative_to(ROOT)} imports {others}"


def test_the_core_stays_small() -> None:
    lines = {module: len((ROOT / "server" / f"{module}.py").read_text().splitlines()) for module in CORE}
    assert sum(lines.values()) < CORE_LINES, lines


def test_what_every_room_may_import_brings_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'peft', 'typer'}"
    script = f"import sys, {', '.join(SHARED)}; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_help_needs_no_heavy_library() -> None:
    tree = ast.parse((ROOT / "manylora.py").read_text())
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
    modules = names | {node.module for node in at_import if isinstance(node, ast.ImportFrom)}
    assert modules <= {"os", "sys", "collections.abc", "bases"}


MODULES_IN_A_FOLDER = 17
"""A folder's names are a table of contents only while there are few of them. ``__init__`` does not count."""


@pytest.mark.parametrize("room", sorted(OURS - {"manylora"} | {"tests"}))
def test_no_folder_is_too_full(room: str) -> None:
    for folder in [ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())]:
        modules = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) <= MODULES_IN_A_FOLDER, f"{folder.relative_to(ROOT)}: {sorted(modules)}"


def test_only_the_api_and_what_runs_it_on_ray_know_the_api() -> None:
    for file in sorted((ROOT / "server").rglob("*.py")):
        path = file.relative_to(ROOT)
        if not path.is_relative_to("server/api") and not path.is_relative_to("server/ray"):
            assert not [name for name in imports(file) if name.startswith("server.api")], path


def test_the_policy_of_routing_knows_no_ray() -> None:
    for module in ("policy", "references", "exchange", "gateway", "names", "metrics_page", "settings"):
        names = set(imports(ROOT / "server" / "ray" / f"{module}.py"))
        assert not [name for name in names if name.partition(".")[0] == "ray"], module
