"""The load test for GPUs runs to its end; on a CPU its figures mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from loadtests.micro.gpu import main


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tiny(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        file = tmp_path / "gpu.json"
        words = ["--tiny", "--device", device, "--context", "20", "--prefill", "40", "--repeats", "2"]
        assert main([*words, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    decoded = [(row["work"], row["rows"], row["adapters"]) for row in result["rows"]]
    assert ("decode", 64, 64) in decoded
    assert ("peft decode", 64, 64) in decoded
    assert ("prefill", 40, 1) in decoded
    assert ("prefill", 32, 16) in decoded
    assert len(result["goals"]) == 4
    assert result["disturbance"].keys() >= {"quiet_p95_ms", "loading_p95_ms"}
    assert "| decode | 64 | 64 |" in capsys.readouterr().out
