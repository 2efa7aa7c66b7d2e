"""Adapters whose initialisation changed the base: the fixes that the error message names, made with PEFT, and served.

LoftQ is left out: PEFT computes it on CUDA only.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.errors import AdapterRejected
from adapters.format.verify import verify
from tests.adapter_folders import layout_of, set_config
from tests.numeric.drive import Drive, settings
from tests.numeric.oracle import Oracle, Request, draw_requests
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's, about what these tests are about; and about how LoRA-GA takes gradients
    pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*specified but will be ignored:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

INITS: Mapping[str, Mapping[str, Any]] = {
    "pissa": {},
    "pissa_niter_4": {},
    "olora": {},
    "corda": {"corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}
"""``init_lora_weights`` that change the base -> the other arguments of ``LoraConfig`` that they need."""
TOKENS = torch.arange(65, 105)[None]
STEPS = 8


@dataclass(frozen=True)
class Trained:
    """A trained adapter, and PEFT's answers with it."""

    after: Path
    """The adapter as it was saved."""
    converted: Path
    """The adapter converted as the error message says."""
    requests: list[Request]


def config(init: str) -> LoraConfig:
    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=init, **INITS[init]
    )


def begin(init: str) -> PeftModel:
    """A tiny model with a new adapter, whose initialisation has changed the base."""
    model, lora = tiny_model(), config(init)
    if init == "corda":
        preprocess_corda(model, lora, run_model=lambda: model(TOKENS))
    if init == "lora_ga":
        model.requires_grad_(True)
        preprocess_loraga(model, lora, lambda: model(TOKENS, labels=TOKENS).loss.backward())
    return get_peft_model(model, lora)


def train(model: PeftModel) -> None:
    """Train long enough to change the answers."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=INITS)
def init(request: pytest.FixtureRequest) -> str:
    """Each of INITS in turn."""
    return str(request.param)


@pytest.fixture
def trained(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Train and convert with the calls that the error message names."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = begin(init)
    model.save_pretrained("init")
    train(model)
    model.save_pretrained("after")
    model.save_pretrained("out", path_initial_model_for_weight_conversion="init")
    requests = draw_requests(Oracle.of(model), [(("default", 1.0),)] * 6, random.Random(0))
    return Trained(tmp_path / "after", tmp_path / "out", requests)


def serve(model: PreTrainedModel, folder: Path, requests: list[Request], root: Path) -> None:
    """Check that the engine gives PEFT's answers."""
    drive = Drive(model, {"served": folder}, settings(root))
    drive.serve([replace(request, mix=(("served", 1.0),)) for request in requests], random.Random(1))


def test_the_adapter_as_saved_is_refused_with_instructions(trained: Trained) -> None:
    with pytest.raises(AdapterRejected) as caught:
        verify(trained.after, layout_of(tiny_model()), 16)
    for part in (
        "init_lora_weights: '",
        "changes the base's own weights",
        '`model.save_pretrained("init")` before training',
        '`model.save_pretrained("out", path_initial_model_for_weight_conversion="init")`',
        "docs/registry.md",
    ):
        assert part in str(caught.value)


def test_the_adapter_as_saved_on_the_original_base_answers_differently(trained: Trained) -> None:
    """Otherwise no conversion would be needed."""
    set_config(trained.after, init_lora_weights=True)
    oracle = Oracle(tiny_model(), {"trained": trained.after})
    for request in trained.requests:
        assert oracle.solo((("trained", 1.0),), request.prompt, len(request.answer)).tokens != request.answer


def test_the_converted_adapter_answers_as_peft_does(trained: Trained, tmp_path: Path) -> None:
    serve(tiny_model(), trained.converted, trained.requests, tmp_path / "served")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_deterministic_initialisation_can_be_repeated(init: str, trained: Trained, tmp_path: Path) -> None:
    """As docs/registry.md says."""
    begin(init).save_pretrained("again")
    model = PeftModel.from_pretrained(tiny_model(), trained.after)
    model.save_pretrained("converted", path_initial_model_for_weight_conversion="again")
    serve(tiny_model(), tmp_path / "converted", trained.requests, tmp_path / "served")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_changed_base_can_be_served_instead(trained: Trained, tmp_path: Path) -> None:
    """As docs/registry.md says. For LoftQ this is the only way."""
    PeftModel.from_pretrained(tiny_model(), trained.after).unload().save_pretrained("base")
    set_config(trained.after, init_lora_weights=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    serve(base, trained.after, trained.requests, tmp_path / "served")
