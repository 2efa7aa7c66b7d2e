"""Generates random LoRA adapters in PEFT's format, without torch or PEFT.

``python -m loadtests.workload.adapters --out DIR --count 64`` writes ``DIR/bench-000``, ... for servers that load their
adapters when they start. With ``--gguf`` it writes files for llama.cpp.
"""

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from safetensors.numpy import save

from bases import pydantic_errors
from loadtests.workload.workload import adapter_name

Targets = Literal["all-linear", "attention", "qv"]
_TARGETS: Mapping[Targets, tuple[str, ...]] = {
    "all-linear": ("self_attn", "mlp"),
    "attention": ("self_attn",),
    "qv": ("self_attn.q_proj", "self_attn.v_proj"),
}

RANK = 16
SCALE = 2
"""lora_alpha / rank."""
B_STD = 0.02
"""Standard deviation of B. Changes the logits clearly and keeps the text readable: at rank 16 and lora_alpha 32 the
update of a layer has about 0.16 times the root mean square of its input."""


Size = Annotated[int, Field(ge=1, le=1_000_000)]


class _Config(BaseModel):
    """The fields that are read from a ``config.json``."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a model with Llama's layers. The defaults are the demo model's, SmolLM2-135M."""

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64

    @classmethod
    def read(cls, config: Path) -> Self:
        """Read the dimensions from a Hugging Face ``config.json``. Raises OSError, and ValueError naming the field."""
        try:
            values = _Config.model_validate_json(config.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field, problem = pydantic_errors.path(first), pydantic_errors.message(first)
            raise ValueError(f"`{field}` {problem}" if field else problem) from None
        heads = values.num_attention_heads
        return cls(
            hidden=values.hidden_size,
            intermediate=values.intermediate_size,
            layers=values.num_hidden_layers,
            heads=heads,
            kv_heads=values.num_key_value_heads or heads,
            head_dim=values.head_dim or max(values.hidden_size // heads, 1),
        )

    def linears(self, targets: Targets = "all-linear") -> Iterator[tuple[str, int, int]]:
        """Yield the linear layers that are targets: name, in_features, out_features."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": (self.hidden, q),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (q, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }
        for layer in range(self.layers):
            for name, (inputs, outputs) in shapes.items():
                if name.startswith(_TARGETS[targets]):
                    yield f"model.layers.{layer}.{name}", inputs, outputs


@dataclass(frozen=True, slots=True)
class AdapterGenerator:
    """Generates the adapters of a benchmark. An adapter depends on its number and these fields alone."""

    shape: ModelShape = ModelShape()
    seed: int = 0
    ranks: Sequence[int] = (RANK,)
    """Ranks of the adapters, in turn."""
    targets: Targets = "all-linear"

    def rank(self, number: int) -> int:
        """Return the rank of the ``number``-th adapter."""
        return self.ranks[number % len(self.ranks)]

    def tensors(self, number: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield each layer's name, A [rank, in] ~ N(0, 1/in) and B [out, rank] ~ N(0, B_STD^2), in float16."""
        rank, seed = self.rank(number), self.seed * 1_000_000 + number
        for name, inputs, outputs in self.shape.linears(self.targets):
            rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
            a = rng.standard_normal((rank, inputs), dtype=np.float32) / np.sqrt(inputs, dtype=np.float32)
            b = rng.standard_normal((outputs, rank), dtype=np.float32) * np.float32(B_STD)
            yield name, a.astype(np.float16), b.astype(np.float16)

    def files(self, number: int) -> Mapping[str, bytes]:
        """Return the content of one adapter's files, by file name."""
        tensors = {}
        for name, a, b in self.tensors(number):
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        return {
            "adapter_config.json": json.dumps(self._config(number), indent=2).encode() + b"\n",
            "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        }

    def write(self, root: Path, number: int) -> Path:
        """Write one adapter to a folder with its name under ``root`` and return the folder."""
        folder = root / adapter_name(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(number).items():
            (folder / name).write_bytes(content)
        return folder

    def _config(self, number: int) -> dict[str, object]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": self.rank(number),
            "lora_alpha": self.rank(number) * SCALE,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": sorted({name.rpartition(".")[2] for name, _, _ in self.shape.linears(self.targets)}),
        }


def main() -> None:
    """Write the adapters of a benchmark to a folder."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.workload.adapters", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rank", type=int, nargs="+", default=[RANK], help="ranks of the adapters, in turn")
    parser.add_argument("--targets", choices=get_args(Targets), default="all-linear")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="config.json of the base (default: the demo model's)")
    parser.add_argument("--gguf", action="store_true", help="write bench-000.gguf ... for llama.cpp")
    args = parser.parse_args()
    from loadtests.workload.gguf_adapters import write_gguf

    shape = ModelShape.read(args.config) if args.config else ModelShape()
    generator = AdapterGenerator(shape, args.seed, args.rank, args.targets)
    for number in range(args.count):
        written = write_gguf(generator, args.out, number) if args.gguf else generator.write(args.out, number)
        print(f"{adapter_name(number)}={written.resolve()}")


if __name__ == "__main__":
    main()
