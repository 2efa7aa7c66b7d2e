"""Every Triton kernel compiles to machine code, without a GPU, too: the interpreter accepts more than the compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LORA = {"_shrink_decode_kernel", "_shrink_prefill_kernel", "_expand_decode_kernel", "_expand_prefill_kernel"}
ATTENTION = {"_write_kv_kernel", "_attention_kernel", "_combine_splits_kernel"}
KERNELS = LORA | ATTENTION | {"_rms_norm_kernel", "_rotary_kernel", "_silu_and_mul_kernel"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
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
