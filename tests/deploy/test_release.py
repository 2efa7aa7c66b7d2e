"""A release: the sdist makes the checkout's wheel, which serves in an empty environment without a compiler."""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
DEMO = re.search(r"^DEMO := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
PAGE = {"server/page/dist/index.html", "server/page/dist/index.html.br", "server/page/dist/assets/index-DlF--8zV.js"}
BACKEND = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
"""Builds without a tool: `python -m build` would fetch setuptools anew."""


def build(tree: Path, kind: str, to: Path, **environment: str) -> Path:
    """Build ``sdist`` or ``wheel`` of a tree."""
    to.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BACKEND, f"build_{kind}", str(to)]
    built = subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return to / built.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, str]:
    """Digests by file, of all but the list of files itself."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Git has, without what lies beside it but the web page, as if it were built."""
    tree = tmp_path_factory.mktemp("checkout")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "--extract", "--directory", tree], input=archive, check=True)
    for name in PAGE:
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (tree / "server" / "page" / "node_modules" / "@x").mkdir(parents=True)
    (tree / "server" / "page" / "node_modules" / "@x" / "gyp.py").write_text("")
    return tree


@pytest.fixture(scope="module")
def unpacked(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(checkout, "sdist", folder)) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = (path for path in folder.iterdir() if path.is_dir())
    return tree


@pytest.mark.slow
def test_the_sdist_makes_the_wheel_of_the_checkout(checkout: Path, unpacked: Path, tmp_path: Path) -> None:
    ours, theirs = (contents(build(tree, "wheel", tmp_path / tree.name)) for tree in (checkout, unpacked))
    assert len(ours) > 300
    assert any(name.endswith(".c") for name in ours)
    assert theirs == ours
    assert {name for name in ours if name.startswith("server/page/")} == PAGE, "built, without sources"


@pytest.mark.slow
def test_the_sdist_has_the_sources_of_the_page(unpacked: Path) -> None:
    page = unpacked / "server" / "page"
    assert (page / "package-lock.json").is_file()
    assert (page / ".npmrc").is_file()
    assert (page / "src" / "main.ts").is_file()
    assert not (page / "node_modules").exists()


@contextmanager
def serving(program: Path, home: Path) -> Iterator[str]:
    """Serve the demo model with nothing on the path: no compiler. Yields the server's address."""
    environment = {"PATH": str(program.parent), "HOME": str(home)}
    server = subprocess.Popen([program, "serve", "--port", "0"], env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.match(r"serving .* on (http://\S+);", line):
                break
        else:
            pytest.fail("".join(lines))
        yield found[1]
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.stdout.close()


@pytest.mark.slow
def test_the_wheel_serves_in_an_empty_environment(unpacked: Path, tmp_path: Path) -> None:
    """Made from the sdist, with compiled kernels, as `make wheel` does."""
    wheel = build(unpacked, "wheel", tmp_path / "dist", MANYLORA_PREBUILD="1")
    venv.create(tmp_path / "empty", with_pip=True)
    program = tmp_path / "empty" / "bin" / "python"
    pip = [program, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, wheel], check=True)
    assert DEMO
    subprocess.run([*pip, "--no-deps", DEMO[1]], check=True)
    question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    with serving(program.with_name("manylora"), tmp_path) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json={**question, "max_tokens": 24}, timeout=120)
        assert "Paris" in answer.json()["choices"][0]["message"]["content"], answer.text
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        assert httpx.get(f"{address}/version").json()["version"] == version
