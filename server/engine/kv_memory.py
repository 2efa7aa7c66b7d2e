"""The size of the KV cache: as ``--kv-memory-gib`` says, or chosen by the model and the free memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from bases import machine
from bases.base import Base
from bases.errors import ConfigError
from server.compute.attention import block_bytes
from server.compute.layers import LinearGroup
from server.config import Settings
from server.engine.slots import PAGE, pages_for

TYPICAL_LENGTH = 384
"""Tokens of prompt and answer that each of ``--max-batch-sequences`` gets space for, on a CPU. A longer sequence uses
what shorter ones leave."""
CPU_SHARE = 0.5
"""Largest share of a machine's free memory: adapters in host memory and other programs need some, too."""
GPU_SHARE = 0.8
"""Largest share of a GPU's free memory: the server has the GPU to itself, but steps need some for activations."""
GIB = 2**30


@dataclass(frozen=True)
class KvCacheSize:
    """The number of KV blocks, and the reason."""

    blocks: int
    reason: str
    """A line to print at start."""


def kv_cache_size(
    shapes: Mapping[int, tuple[int, int]], groups: Iterable[LinearGroup], base: Base, settings: Settings
) -> KvCacheSize:
    """Size the KV cache, for a base that is already in memory and adapters that will be on the device.

    ``shapes``: layer -> (KV heads, head size) as they lie in memory. Raises ConfigError if it does not fit, or is too
    small for one context.
    """
    block = block_bytes(shapes, settings.block_size, base.dtype)
    free = machine.free_memory(base.device)
    adapters = adapter_bytes(groups, settings, base.dtype)
    if settings.kv_memory_gib is None:
        blocks, why = _auto_size(block, free - adapters, base, settings)
        why = f"auto: {why}; {_gib(free)} free {_on_device(base.device)}"
    else:
        blocks = _checked_size(settings.kv_memory_gib, block, free, adapters, base, settings)
        why = "as --kv-memory-gib says"
    tokens = blocks * settings.block_size
    return KvCacheSize(blocks, f"keys and values: {_gib(blocks * block)}, {tokens} tokens ({why})")


def adapter_bytes(groups: Iterable[LinearGroup], settings: Settings, dtype: torch.dtype) -> int:
    """Return the bytes that adapters need on the device, once every linear layer has had one."""
    columns = pages_for(settings.rank_columns) * PAGE * dtype.itemsize
    return sum(columns * (len(group.names) * group.shape.inputs + sum(group.shape.outs)) for group in groups)


def _checked_size(gib: float, block: int, free: int, adapters: int, base: Base, settings: Settings) -> int:
    memory = gib * GIB
    if memory > free:
        raise ConfigError(f"--kv-memory-gib: {gib} GiB is more than the {_gib(free)} free {_on_device(base.device)}")
    if memory + adapters > free:
        raise ConfigError(
            f"--kv-memory-gib: {gib} GiB leave less than the {_gib(adapters)} that adapters on the device may take, of "
            f"{_gib(free)} free {_on_device(base.device)}; give less, or lower --max-device-adapters or --device-ranks"
        )
    blocks = int(memory) // block
    if blocks * settings.block_size < base.max_model_len:
        raise ConfigError(
            f"--kv-memory-gib: {gib} GiB hold {blocks * settings.block_size} tokens, fewer than one context of "
            f"{base.max_model_len}; give more or lower --max-model-len"
        )
    return blocks


def _auto_size(block: int, free: int, base: Base, settings: Settings) -> tuple[int, str]:
    """Return as many blocks as are useful, within a share of the memory that base and adapters leave; and why."""
    on_gpu = base.device.type == "cuda"
    share = GPU_SHARE if on_gpu else CPU_SHARE
    size, context, sequences = settings.block_size, base.max_model_len, settings.max_batch_sequences
    most = max(0, int(share * free)) // block
    if most * size < context:
        longest = f"lower it to {most * size}" if most else "lower --max-device-adapters or --device-ranks"
        raise ConfigError(
            f"--max-model-len: keys and values of one context of {context} tokens take "
            f"{_gib(-(-context // size) * block)}, more than {share:.0%} of the {_gib(max(0, free))} that base and "
            f"adapters leave free {_on_device(base.device)}; {longest}, or set --kv-memory-gib"
        )
    length = context if on_gpu else min(context, TYPICAL_LENGTH)
    typical, one = sequences * -(-length // size), -(-context // size)
    if most < max(typical, one):
        return most, f"{share:.0%} of what base and adapters leave"
    return max((typical, f"{sequences} sequences of {length} tokens"), (one, f"one context of {context} tokens"))


def _on_device(device: torch.device) -> str:
    if device.type == "cuda":
        return "on the GPU"
    limit = machine.memory().limit
    return "on this machine" if limit is None else f"in this container, limited by {limit}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"
