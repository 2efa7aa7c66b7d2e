"""Random LoRA adapters as PEFT folders, made without torch or PEFT.

``python -m loadtests.adapters --out DIR --count 64`` writes ``DIR/bench-000`` ... for a server that must know its
adapters when it starts.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors.numpy import save_file

from loadtests.workload import adapter_name

RANK = 16
ALPHA = 32
B_STD = 0.02
"""Moves the logits clearly and leaves text that can be read: at rank 16, alpha 32 an update has about 0.16 times the
root mean square of its layer's input."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The linear layers of a Llama-shaped model. The defaults are SmolLM2-135M's, the demo model."""

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64

    @classmethod
    def read(cls, config: Path) -> Self:
        """The geometry in a Hugging Face ``config.json``. Raises KeyError for a model of another kind."""
        values = json.loads(config.read_text())
        heads = values["num_attention_heads"]
        return cls(
            hidden=values["hidden_size"],
            intermediate=values["intermediate_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads", heads),
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        )

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Every linear layer of the decoder: its name, in_features, out_features."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.self_attn.q_proj", self.hidden, q
            yield f"{prefix}.self_attn.k_proj", self.hidden, kv
            yield f"{prefix}.self_attn.v_proj", self.hidden, kv
            yield f"{prefix}.self_attn.o_proj", q, self.hidden
            yield f"{prefix}.mlp.gate_proj", self.hidden, self.intermediate
            yield f"{prefix}.mlp.up_proj", self.hidden, self.intermediate
            yield f"{prefix}.mlp.down_proj", self.intermediate, self.hidden


def write_adapter(folder: Path, geometry: Geometry, seed: int, rank: int = RANK, alpha: int = ALPHA) -> None:
    """Write one adapter on all linear layers: A [rank, in] ~ N(0, 1/in), B [out, rank] ~ N(0, B_STD^2), float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, inputs, outputs in geometry.linears():
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        a = rng.standard_normal((rank, inputs), dtype=np.float32) / np.sqrt(inputs, dtype=np.float32)
        b = rng.standard_normal((outputs, rank), dtype=np.float32) * np.float32(B_STD)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_config(geometry, rank, alpha), indent=2) + "\n")


def write_adapters(root: Path, geometry: Geometry, count: int, seed: int = 0, rank: int = RANK) -> dict[str, Path]:
    """Write ``count`` different adapters under ``root``; name -> folder."""
    folders = {adapter_name(number): root / adapter_name(number) for number in range(count)}
    for number, folder in enumerate(folders.values()):
        write_adapter(folder, geometry, seed * 1_000_000 + number, rank)
    return folders


def _config(geometry: Geometry, rank: int, alpha: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name, _, _ in geometry.linears()}),
    }


def main() -> None:
    """Write the benchmark's adapters to a folder."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.adapters", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="config.json of the base (default: the demo model's shape)")
    args = parser.parse_args()
    geometry = Geometry.read(args.config) if args.config else Geometry()
    for name, folder in write_adapters(args.out, geometry, args.count, args.seed, args.rank).items():
        print(f"{name}={folder.resolve()}")


if __name__ == "__main__":
    main()
