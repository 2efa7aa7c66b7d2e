"""Compiling the C kernels, once for each source, compiler and set of flags."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from server.compute.cpu.variants import Variant

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    *("-O3", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi"),
    "-ffp-contract=off",  # a fused multiply-add only where the source says so: the same bits from every variant
)


class NoCompiler(RuntimeError):
    """There is no C compiler on this machine."""


def library(variant: Variant) -> Path:
    """The compiled library, built unless it is in the cache. Raises NoCompiler, CalledProcessError, OSError."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise NoCompiler(f"no C compiler: {' '.join(compiler) or 'CC is empty'}")
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    sources = sorted(SOURCES.glob("*.c"))
    texts = (path.read_bytes() for path in (*sources, *sorted(SOURCES.glob("*.h"))))
    command = (*compiler, *FLAGS, *variant.flags)
    parts = [version.encode(), *texts, *(word.encode() for word in command)]
    found = _cache() / f"kernels-{variant.name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not found.exists():
        _compile([*command, *map(str, sources)], found)
    return found


def _cache() -> Path:
    """Where compiled libraries are kept. Raises OSError where there is no home: anybody could write elsewhere."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manylora"
    except RuntimeError as error:
        raise OSError(f"{error} Set HOME or XDG_CACHE_HOME to a folder for the compiled kernels.") from error


def _compile(command: list[str], to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as work:
        made = Path(work) / to.name
        subprocess.run([*command, "-o", str(made), "-lm"], check=True, capture_output=True, text=True)
        with made.open("rb") as written:
            os.fsync(written.fileno())
        made.rename(to)
