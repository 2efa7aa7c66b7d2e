"""The compiled C kernels: brought by a wheel, or compiled here once for each source, compiler and set of flags."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from bases import machine
from server.compute.cpu.variants import Variant

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Libraries that ``make wheel`` compiled (setup.py). A checkout has none."""
FLAGS = (
    *("-O3", "-fPIC", "-fopenmp", "-Wno-psabi"),
    "-ffp-contract=off",  # a fused multiply-add only where the source says so: the same bits from every variant
)
LINK = ("-shared", "-fopenmp", "-lm")


class NoCompiler(RuntimeError):
    """There is no C compiler on this machine."""


def library(variant: Variant) -> Path:
    """The compiled library: the wheel's if it was made from these sources, else the cache's, compiled if need be.

    Processes that need the same library at the same time wait for the first one, which compiles it.
    Raises NoCompiler, CalledProcessError, OSError.
    """
    prebuilt = PREBUILT / file_name(variant)
    if prebuilt.exists():
        return prebuilt
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    found = _cache() / file_name(variant, [*compiler, version])
    if not found.exists():
        found.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{found}.lock"):  # Linux releases it when its holder dies
            if not found.exists():
                compile_library(variant, compiler, found)
    return found


def file_name(variant: Variant, compiler: Sequence[str] = ()) -> str:
    """Differs with the sources, the flags, the processor's architecture, and what else is to be told apart."""
    texts = (path.read_bytes() for path in (*_sources(), *sorted(SOURCES.glob("*.h"))))
    words = (platform.machine(), *compiler, *FLAGS, *variant.flags)
    parts = [*texts, *(word.encode() for word in words)]
    return f"kernels-{variant.name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def find_compiler() -> list[str]:
    """The words of the command that compiles C: ``$CC``, by default ``cc``. Raises NoCompiler."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise NoCompiler(
            f"no C compiler ({' '.join(compiler) or 'CC is empty'}), and this installation brought no compiled kernels "
            "for this processor. Install gcc or clang, or a wheel made by `make wheel`"
        )
    return compiler


def compile_library(variant: Variant, compiler: Sequence[str], to: Path) -> None:
    """Compile the sources side by side and link them. ``to`` is there only when it is complete.

    Raises CalledProcessError, OSError.
    """
    with tempfile.TemporaryDirectory(dir=to.parent) as work, ThreadPoolExecutor(machine.usable_cores()) as pool:
        objects = [str(Path(work) / f"{source.name}.o") for source in _sources()]
        commands = (
            [*compiler, *FLAGS, *variant.flags, "-c", str(source), "-o", compiled]
            for source, compiled in zip(_sources(), objects, strict=True)
        )
        _wait(pool.map(_run, commands))
        made = Path(work) / to.name
        _run([*compiler, *objects, "-o", str(made), *LINK])
        with made.open("rb") as written:
            os.fsync(written.fileno())
        made.rename(to)


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.c"))


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _wait(results: Iterable[None]) -> None:
    """Until all are there. Raises what the first one raised that failed."""
    for _ in results:
        pass


def _cache() -> Path:
    """Where compiled libraries are kept. Raises OSError where there is no home: anybody could write elsewhere."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manylora"
    except RuntimeError as error:
        raise OSError(f"{error} Set HOME or XDG_CACHE_HOME to a folder for the compiled kernels.") from error
