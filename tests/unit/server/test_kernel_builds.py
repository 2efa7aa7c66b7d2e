"""Where the compiled kernels come from: a wheel, the cache, the compiler; also when processes start together."""

import platform
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.compute.cpu import build, selection
from server.compute.cpu.variants import VARIANTS, of_architecture

ROOT = Path(__file__).parents[3]
PORTABLE = VARIANTS[-1]
LIBRARY = """
from server.compute.cpu.build import library
from server.compute.cpu.variants import VARIANTS
print("ready", flush=True)
input()
print(library(VARIANTS[-1]), flush=True)
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's compiler, quick and without optimising, with an empty cache. The file has a line for each call."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    _write_compiler(tmp_path, 'exec cc "$@" -O0')
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "calls"


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "missing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


@pytest.fixture
def prebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a wheel's libraries."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    monkeypatch.setattr(build, "PREBUILT", folder)
    monkeypatch.setattr(selection, "PREBUILT", folder)
    return folder


def _write_compiler(folder: Path, then: str) -> None:
    (folder / "cc").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{then}\n')
    (folder / "cc").chmod(0o755)


def _compiled_sources(calls: Path) -> list[str]:
    words = (line.split() for line in calls.read_text().splitlines())
    return sorted(Path(line[line.index("-c") + 1]).name for line in words if "-c" in line)


@pytest.fixture
def start() -> Iterator["subprocess.Popen[str]"]:
    """Starts a process that asks for a library when it reads a line. All are gone afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", LIBRARY], cwd=ROOT, text=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_processes_that_start_together_compile_once(compiler: Path, start) -> None:
    processes = [start() for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    paths = {process.stdout.readline().strip() for process in processes}
    assert paths == {str(build.library(PORTABLE))}
    assert _compiled_sources(compiler) == sorted(path.name for path in build.SOURCES.glob("*.c"))
    assert selection.compiled(PORTABLE).variant is PORTABLE


def test_a_process_that_is_killed_while_it_compiles_does_not_stop_the_next(compiler: Path, start) -> None:
    folder = compiler.parent
    _write_compiler(folder, 'case "$*" in *-c*) while kill -0 $PPID; do sleep 0.1; done;; esac')
    process = start()
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    while not (compiler.exists() and _compiled_sources(compiler)):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    _write_compiler(folder, 'exec cc "$@" -O0')
    assert selection.compiled(PORTABLE).variant is PORTABLE


def test_the_wheels_library_is_used_before_any_compiling(compiler: Path, prebuilt: Path) -> None:
    made = prebuilt / build.file_name(PORTABLE)
    build.compile_library(PORTABLE, build.find_compiler(), made)
    compiler.unlink()
    assert selection.compiled(PORTABLE).path == made
    assert not compiler.exists()


@pytest.mark.usefixtures("no_compiler")
def test_the_wheels_library_is_used_without_a_compiler(prebuilt: Path) -> None:
    (prebuilt / build.file_name(PORTABLE)).touch()
    assert build.library(PORTABLE).parent == prebuilt


@pytest.mark.usefixtures("no_compiler")
def test_a_library_of_other_sources_is_not_used(prebuilt: Path, tmp_path: Path, monkeypatch) -> None:
    (prebuilt / build.file_name(PORTABLE)).touch()
    sources = Path(shutil.copytree(build.SOURCES, tmp_path / "csrc"))
    (sources / "tiles.h").write_text((sources / "tiles.h").read_text() + "\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(build.NoCompiler, match="this installation brought no compiled kernels"):
        build.library(PORTABLE)


@pytest.mark.usefixtures("no_compiler")
def test_a_damaged_library_of_the_wheel_is_left_there(prebuilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    for variant in VARIANTS:
        (prebuilt / build.file_name(variant)).write_text("damaged")
    assert selection.select_kernels.__wrapped__("auto").kernels is None
    assert "The C kernels cannot be used" in caplog.text
    assert len(list(prebuilt.iterdir())) == len(VARIANTS)


def test_a_damaged_library_of_the_cache_is_compiled_anew(compiler: Path) -> None:
    build.library(PORTABLE).write_text("damaged")
    assert selection.compiled(PORTABLE).path == build.library(PORTABLE)


def test_all_variants_of_x86_and_the_portable_one_elsewhere() -> None:
    assert of_architecture("x86_64") == VARIANTS
    assert of_architecture("aarch64") == (PORTABLE,)


@pytest.mark.slow
def test_wheels(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels compiled a wheel is this platform's; without, it is anybody's, and made without a compiler."""
    unneeded = shutil.ignore_patterns(".*", "build", "dist", "docs", "tests", "__pycache__", "*.egg-info")
    tree = Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=unneeded))
    monkeypatch.setenv("MANYLORA_PREBUILD", "1")
    name, libraries = _make_wheel(tree, tmp_path / "compiled")
    assert name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    assert libraries == sorted(build.file_name(variant) for variant in of_architecture(platform.machine()))
    monkeypatch.delenv("MANYLORA_PREBUILD")
    monkeypatch.setenv("CC", str(tmp_path / "missing"))
    name, libraries = _make_wheel(tree, tmp_path / "plain")
    assert name.endswith("-py3-none-any.whl")
    assert libraries == []


def _make_wheel(tree: Path, to: Path) -> tuple[str, list[str]]:
    """Its name, and those of the libraries in it."""
    command = [
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(to),
        str(tree),
    ]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    (wheel,) = to.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    return wheel.name, sorted(Path(name).name for name in names if name.endswith(".so"))
