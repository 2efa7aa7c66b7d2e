"""How much memory keys and values get: as ``--kv-memory-gib`` says, or chosen from the model and what is free."""

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

USUAL_LENGTH = 384
"""Tokens of prompt and answer for which each of ``--max-batch-sequences`` has room at the same time, on a CPU. A longer
sequence takes what shorter ones leave."""
SHARE = 0.5
"""Of a machine's free memory, at most: adapters in host memory want some, and so do other programs."""
DEVICE_SHARE = 0.8
"""Of a GPU's, which a server has to itself, but for what a step takes."""
GIB = 2**30


@dataclass(frozen=True)
class KvCacheSize:
    """Blocks for keys and values, and why so many."""

    blocks: int
    reason: str
    """A line for whoever starts the server."""


def kv_room(
    shapes: Mapping[int, tuple[int, int]], groups: Iterable[LinearGroup], base: Base, settings: Settings
) -> KvCacheSize:
    """Room for keys and values beside a base that is in memory, and beside the adapters that will be on the device.

    shapes: layer -> (KV heads, head size). Raises ConfigError where that does not fit, or not one whole context does.
    """
    block = block_bytes(shapes, settings.block_size, base.dtype)
    free = machine.free_memory(base.device)
    adapters = adapter_bytes(groups, settings, base.dtype)
    if settings.kv_memory_gib is None:
        blocks, why = _chosen(block, free - adapters, base, settings)
        why = f"auto: {why}; {_gib(free)} free {_where(base.device)}"
    else:
        blocks, why = _given(settings.kv_memory_gib, block, free, adapters, base, settings), "as --kv-memory-gib says"
    tokens = blocks * settings.block_size
    return KvCacheSize(blocks, f"keys and values: {_gib(blocks * block)}, {tokens} tokens ({why})")


def adapter_bytes(groups: Iterable[LinearGroup], settings: Settings, dtype: torch.dtype) -> int:
    """What adapters take on the device once every linear layer has had one."""
    columns = pages_for(settings.rank_columns) * PAGE * dtype.itemsize
    return sum(columns * (len(group.names) * group.shape.inputs + sum(group.shape.outs)) for group in groups)


def _given(gib: float, block: int, free: int, adapters: int, base: Base, settings: Settings) -> int:
    memory = gib * GIB
    if memory > free:
        raise ConfigError(f"--kv-memory-gib: {gib} GiB is more than the {_gib(free)} free {_where(base.device)}")
    if memory + adapters > free:
        raise ConfigError(
            f"--kv-memory-gib: {gib} GiB leave less than adapters on the device may take, {_gib(adapters)}, of the "
            f"{_gib(free)} free {_where(base.device)}; give less, or lower --max-device-adapters or --device-ranks"
        )
    blocks = int(memory) // block
    if blocks * settings.block_size < base.max_model_len:
        raise ConfigError(
            f"--kv-memory-gib: {gib} GiB hold {blocks * settings.block_size} tokens, fewer than one context of "
            f"{base.max_model_len}; give more or lower --max-model-len"
        )
    return blocks


def _chosen(block: int, free: int, base: Base, settings: Settings) -> tuple[int, str]:
    """As many blocks as are of use, within a share of the memory that base and adapters leave; and the reason."""
    on_gpu = base.device.type == "cuda"
    share = DEVICE_SHARE if on_gpu else SHARE
    size, context, sequences = settings.block_size, base.max_model_len, settings.max_batch_sequences
    most = max(0, int(share * free)) // block
    if most * size < context:
        longest = f"lower it to {most * size}" if most else "lower --max-device-adapters or --device-ranks"
        raise ConfigError(
            f"--max-model-len: keys and values of one context of {context} tokens take "
            f"{_gib(-(-context // size) * block)}, more than {share:.0%} of the {_gib(max(0, free))} that base and "
            f"adapters leave free {_where(base.device)}; {longest}, or say --kv-memory-gib yourself"
        )
    length = context if on_gpu else min(context, USUAL_LENGTH)
    usual, one = sequences * -(-length // size), -(-context // size)
    if most < max(usual, one):
        return most, f"{share:.0%} of what base and adapters leave"
    return max((usual, f"{sequences} sequences of {length} tokens"), (one, f"one context of {context} tokens"))


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return "on the GPU"
    limit = machine.memory().limit
    return "on this machine" if limit is None else f"in this container, by {limit}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"
