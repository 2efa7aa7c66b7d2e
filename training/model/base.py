"""The base model, ready to be trained on."""

import os

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from torch import nn

from bases.base import Base, Say, load_base
from bases.nf4 import Linear4bit
from training.settings import TrainSettings


def open_base(settings: TrainSettings, say: Say = lambda _: None) -> Base:
    """The base that ``settings`` name, the server's own bytes. Raises ConfigError or BaseRejected."""
    if "LOCAL_RANK" in os.environ:
        PartialState(cpu=settings.device == "cpu")  # gives each process of `accelerate launch` a device of its own
    base = load_base(settings.base, say)
    keep_trainable(base.model)
    return base


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the weights at the first forward without gradients.

    It does so on processors with AVX512-BF16, for a faster kernel; gradients are silently wrong from then on, and so is
    what is dequantised. So this must come before the model has run.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
