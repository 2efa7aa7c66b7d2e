"""The demo model in NF4 with adapters of ranks 4, 16 and 64: the engine against PEFT on the same NF4 weights."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.numeric.demo import MIXES, Answers, check_close, serve_demo
from tests.numeric.oracle import Mix, kl

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def served(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[Mix, Answers]:
    """Every adaptation's answers, all given in one mixed run."""
    root = tmp_path_factory.mktemp("demo")
    (root / "bases").symlink_to(demo_root / "bases")
    return serve_demo(root, "cpu")


@pytest.mark.parametrize("mix", MIXES[1:], ids=str)
def test_adapters_matter(served: Mapping[Mix, Answers], mix: Mix) -> None:
    """An engine that left the adapter out would be many times further away than the bounds below allow."""
    answers = served[mix]
    assert kl(answers.base, answers.oracle) > 10 * 0.01


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_logits_are_those_of_peft(served: Mapping[Mix, Answers], mix: Mix) -> None:
    check_close(served[mix])


def test_the_base_answers_sensibly(served: Mapping[Mix, Answers]) -> None:
    assert "Paris" in served[()].texts[0]
