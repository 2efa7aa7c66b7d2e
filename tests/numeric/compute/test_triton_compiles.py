"""What the interpreter accepts, the compiler need not: every kernel becomes machine code, GPU or no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LORA = {"_shrink_rows", "_shrink_tiles", "_expand_rows", "_expand_tiles"}
KERNELS = LORA | {"_write", "_attend", "_combine", "_norm", "_rotate", "_gate"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.numeric.compile_triton"],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == KERNELS
