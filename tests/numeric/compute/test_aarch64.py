"""The portable kernels on another architecture: cross-compiled, emulated, and the same bits as on this processor."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from server.compute.cpu.build import FLAGS, SOURCES
from server.compute.cpu.variants import VARIANTS, Variant

DRIVER = Path(__file__).parents[1] / "parity.c"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


@pytest.mark.slow
def test_aarch64_computes_the_same_bits(tmp_path: Path) -> None:
    """Debian has what this needs in gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user."""
    if missing := [name for name in ("cc", CROSS_COMPILER, EMULATOR) if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)}")
    here = next(variant for variant in VARIANTS if not variant.lacking())
    expected = results(["cc"], here, [], tmp_path / "here")
    found = results([CROSS_COMPILER, "-static"], VARIANTS[-1], [EMULATOR], tmp_path / "there")
    assert len(expected) > 40
    assert found == expected, (
        f"differ from {here.name}: {', '.join(name for name in expected if found[name] != expected[name])}"
    )


def results(compiler: Sequence[str], variant: Variant, run: Sequence[str], program: Path) -> dict[str, str]:
    """For each case of parity.c, the hash of what the kernels computed."""
    sources = map(str, (DRIVER, *sorted(SOURCES.glob("*.c"))))
    command = (*compiler, *FLAGS, *variant.flags, f"-I{SOURCES}", *sources, "-o", str(program), "-lm")
    subprocess.run(command, check=True)
    lines = subprocess.run([*run, str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split() for line in lines)
