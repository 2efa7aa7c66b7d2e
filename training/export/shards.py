"""Reads a model's safetensors files one tensor at a time, merges an adapter into them, and writes them in shards.

A merge reads the files, not a model in memory: on some processors bitsandbytes repacks 4-bit weights in place at the
first forward pass, and dequantising them afterwards gives garbage.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.format.weights import AdapterWeights
from bases.errors import BaseRejected
from bases.nf4 import functional
from training.progress_bar import Advance, Say

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_STATE = ".quant_state.bitsandbytes__"
"""Separates a 4-bit weight's name and format, in the key of the tensor that holds its shape as JSON."""


class Shards:
    """The weights in a Hugging Face folder, which may be in bitsandbytes' 4-bit format."""

    def __init__(self, folder: Path) -> None:
        """Open the files. Raises BaseRejected if they cannot be read."""
        self._files = _files(folder)
        self._states = {key.partition(_STATE)[0]: key for key in self._files if _STATE in key}
        parts = tuple(f"{name}." for name in self._states)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            key: self._shape(key) for key in sorted(self._files) if not key.startswith(parts)
        }
        """Tensor name -> shape after dequantising."""

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, or in float32 if it is dequantised from 4 bits."""
        stored = self._stored(name)
        if name not in self._states:
            return stored
        parts: dict[str, Any] = {key: self._stored(key) for key in self._files if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        # In the layer's own dtype it would be rounded twice, here and after the merge.
        state.dtype = torch.float32
        plain: Tensor = functional.dequantize_4bit(stored, state)
        return plain

    def _stored(self, key: str) -> Tensor:
        with safe_open(self._files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._states:
            with safe_open(self._files[name], framework="pt") as file:
                return tuple(file.get_slice(name).get_shape())
        return tuple(json.loads(bytes(self._stored(self._states[name]).tolist()))["shape"])


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor. Raises BaseRejected."""
    try:
        if (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        else:
            names = [WEIGHTS]
        files: dict[str, Path] = {}
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), folder / name))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise BaseRejected(f"the weights in {folder} cannot be read: {error}") from error
    return files


class MergeOverflow(BaseRejected):
    """A merged weight overflows the dtype of the export."""


@dataclass(frozen=True)
class MergedWeights:
    """Merged weights: ``W + scaling * B @ A`` for the adapter's layers, W for all others."""

    base: Shards
    adapter: AdapterWeights | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        missing = [layer for layer in self._layers() if f"{layer}.weight" not in self.base.shapes]
        if missing:
            raise BaseRejected(f"the adapter cannot be merged: the base's files have no tensor {missing[0]}.weight")

    @property
    def size_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(map(self.nbytes, self.base.shapes))

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor, in bytes."""
        return torch.Size(self.base.shapes[name]).numel() * self.dtype.itemsize

    def each(self, advance: Advance = lambda _: None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor), reading each when needed; call ``advance`` with the bytes of each after its use."""
        for name in self.base.shapes:
            yield name, self.read(name)
            advance(self.nbytes(name))

    def read(self, name: str) -> Tensor:
        """Return a merged tensor in ``dtype``, summed in float32. Raises MergeOverflow."""
        tensor = self.base.read(name)
        if not tensor.is_floating_point():
            return tensor
        layer = name.removesuffix(".weight")
        if self.adapter and layer in self.adapter.tensors:
            a, b = self.adapter.tensors[layer]
            scaling = self.adapter.spec.targets[layer].scaling
            tensor = tensor.float().addmm_(b.float(), a.float(), alpha=scaling)
        merged = tensor.to(self.dtype)
        if not torch.isfinite(merged).all():
            raise MergeOverflow(f"the merged {name} overflows {str(self.dtype).removeprefix('torch.')}")
        return merged

    def _layers(self) -> Iterable[str]:
        return self.adapter.tensors if self.adapter else ()


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int, say: Say = lambda _: None) -> None:
    """Write ``tensors``, in order, to files of at most ``limit`` bytes or one tensor, with an index.

    ``say`` gets a line per file.
    """
    sizes: list[dict[str, int]] = []
    for number, shard in enumerate(_shards(tensors, limit), 1):
        save_file(shard, folder / f"{number}.part", metadata={"format": "pt"})
        sizes.append({name: tensor.nbytes for name, tensor in shard.items()})
        say(f"wrote weights file {number}, {decimal(sum(sizes[-1].values()))}")
    if len(sizes) == 1:
        (folder / "1.part").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, shard_sizes in enumerate(sizes, 1):
        name = f"model-{number:05}-of-{len(sizes):05}.safetensors"
        (folder / f"{number}.part").rename(folder / name)
        weight_map |= dict.fromkeys(shard_sizes, name)
    total = sum(size for shard_sizes in sizes for size in shard_sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard
