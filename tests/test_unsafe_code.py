"""What must not be in the source: ways in which data becomes code."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("adapters", "bases", "server", "training", "loadtests", "manylora.py")
UNPICKLING = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing", "pandas"}
"""Modules that read pickles, or send them to other processes."""
CALLS = {
    ("os", "system"),
    ("os", "popen"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
}
LOADERS = {("torch", "load"), ("numpy", "load"), ("np", "load")}
"""Read pickles unless they are told not to."""
SANDBOX = "server/text/template_environment.py"
"""Where templates of users are rendered."""
OWN_TEMPLATES = "loadtests/report/"
"""Renders templates of this project only."""


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Every node of every module that a test looks at, with the module's path."""
    files = [
        file for room in ROOMS for file in ((ROOT / room).rglob("*.py") if (ROOT / room).is_dir() else [ROOT / room])
    ]
    looked_at = (ast.Import, ast.ImportFrom, ast.Call, ast.keyword, ast.Constant)
    return [
        (file.relative_to(ROOT).as_posix(), node)
        for file in sorted(files)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, looked_at)
    ]


def calls() -> Iterator[tuple[str, ast.Call, tuple[str, str]]]:
    """Every call, with the names before and after the last dot."""
    for path, node in nodes():
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(name):
                    yield path, node, ("", name)
                case ast.Attribute(ast.Name(owner), name):
                    yield path, node, (owner, name)


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call passes as a keyword; None if it does not."""
    for each in call.keywords:
        if each.arg == name:
            return each.value.value if isinstance(each.value, ast.Constant) else ast.unparse(each.value)
    return None


def test_nothing_unpickles() -> None:
    found = []
    for path, node in nodes():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{path} imports {name}" for name in names if name.partition(".")[0] in UNPICKLING]
    for path, call, name in calls():
        safe = keyword(call, "weights_only") is True if name[0] == "torch" else keyword(call, "allow_pickle") is False
        if name in LOADERS and not safe:
            found.append(f"{path}:{call.lineno} {'.'.join(name)}")
    assert found == []


def test_no_code_of_a_model_is_run() -> None:
    found = []
    for path, node in nodes():
        match node:
            case ast.keyword("trust_remote_code", value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                found.append(f"{path}:{value.lineno}")
            case ast.Constant("trust_remote_code"):
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_bases_are_read_without_code_and_without_pickles() -> None:
    loads = [
        (path, call, owner)
        for path, call, (owner, name) in calls()
        if path.startswith("bases/") and name == "from_pretrained"
    ]
    assert len(loads) >= 4
    for path, call, owner in loads:
        assert keyword(call, "trust_remote_code") is False, f"{path}:{call.lineno}"
        if owner == "AutoModelForCausalLM":
            assert keyword(call, "use_safetensors") is True or keyword(call, "gguf_file"), f"{path}:{call.lineno}"


def test_no_text_is_run_as_code() -> None:
    found = []
    for path, call, name in calls():
        constant = bool(call.args) and isinstance(call.args[0], ast.Constant)
        if name in CALLS or (name in {("", "eval"), ("", "exec"), ("", "compile")} and not constant):
            found.append(f"{path}:{call.lineno} {'.'.join(name)}")
        if keyword(call, "shell") not in (None, False):
            found.append(f"{path}:{call.lineno} shell")
    assert found == []


def test_templates_of_users_are_rendered_in_the_sandbox_only() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, node in nodes()
        if isinstance(node, ast.ImportFrom)
        and node.module == "jinja2"
        and {alias.name for alias in node.names} & {"Environment", "Template"}
        and path != SANDBOX
        and not path.startswith(OWN_TEMPLATES)
    ]
    assert found == []


def test_statements_for_a_database_are_constants() -> None:
    """Values are bound: no text of a client becomes SQL."""
    found = [
        f"{path}:{call.lineno}"
        for path, call, (_, name) in calls()
        if name in ("text", "exec_driver_sql")
        and path.startswith("adapters/")
        and not (call.args and isinstance(call.args[0], ast.Constant))
    ]
    assert found == []
