"""Loads the base model for training."""

import os

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from torch import nn

from bases.base import Base, load_base
from bases.nf4 import Linear4bit
from training.progress_bar import Say
from training.settings import TrainSettings


def open_base(settings: TrainSettings, say: Say = lambda _: None) -> Base:
    """Load the base that ``settings`` name, from the same cache as the server. Raises ConfigError or BaseRejected."""
    if "LOCAL_RANK" in os.environ:
        PartialState(cpu=settings.device == "cpu")  # assigns a device to each process of `accelerate launch`
    base = load_base(settings.base, say)
    keep_trainable(base.model)
    return base


def keep_trainable(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking the 4-bit weights; call this before the model's first forward pass.

    On processors with AVX512-BF16 bitsandbytes repacks them at the first forward without gradients, for a faster
    kernel. After that, gradients and dequantised weights are silently wrong.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
