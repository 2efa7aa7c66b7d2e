"""Whether a model's weights fit into memory, told before they are read: the system would end the process instead."""

from pathlib import Path

import torch

from bases import machine
from bases.errors import ConfigError

WHOLE = 1.0
"""Of a file's size, what is in memory in the end: all of it."""
QUANTISED = 1 / 8
"""The same where it is quantised on the way, at least: float32 becomes 4 bits, a layer at a time."""
UNPACKED = 1 / 2
"""The same for a GGUF file, at least: float32 becomes bfloat16, and all of it is there before it is written."""


def check_memory(weights: Path, part: float, device: torch.device) -> None:
    """Raises ConfigError where the weights, a file or a folder of safetensors, cannot be in memory on ``device``."""
    files = [weights] if weights.is_file() else weights.glob("model*.safetensors")
    needed = part * sum(file.stat().st_size for file in files)
    free = machine.free_memory(device)
    if needed <= free:
        return
    limit = machine.memory().limit if device.type == "cpu" else None
    within = f" in this container, by {limit}" if limit else ""
    raise ConfigError(
        f"--model: the weights in {weights} need {needed / 2**30:.2f} GiB of memory, and {free / 2**30:.2f} GiB "
        f"are free{within}; take a smaller model, or give it more memory"
    )
