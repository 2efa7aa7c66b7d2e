"""What a dry run finds out: everything that would stop the run before its first step."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bases.errors import ConfigError
from tests.training.tiny_run import tiny_settings
from training.job import Job


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^--out: .* is there already"),
        ({"out_": "new", "early_stopping": 1, "eval_steps": 2, "save_steps": 4}, "^--save-steps: "),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    out = tmp_path / settings.pop("out_", "taken")
    with pytest.raises(ConfigError, match=message):
        Job(tiny_settings(tmp_path, out=out, dry_run=True, **settings), Console(file=io.StringIO())).run()
