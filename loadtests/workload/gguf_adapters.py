"""Writes the benchmark's adapters as GGUF files for llama.cpp, for bases of the Llama architecture."""

from pathlib import Path

import gguf
import numpy as np

from bases.gguf_layout import interleave_rotary
from loadtests.workload.adapters import SCALE, AdapterGenerator
from loadtests.workload.workload import adapter_name

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(generator: AdapterGenerator, root: Path, number: int) -> Path:
    """Write one adapter as ``bench-000.gguf``, ... under ``root`` and return the file."""
    root.mkdir(parents=True, exist_ok=True)
    file = root / f"{adapter_name(number)}.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, generator.rank(number) * SCALE)
    for name, a, b in generator.tensors(number):
        _, _, layer, module = name.split(".", 3)
        if heads := _rotary_heads(generator, module):
            b = np.ascontiguousarray(interleave_rotary(b, heads))
        writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight.lora_a", a)
        writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _rotary_heads(generator: AdapterGenerator, module: str) -> int:
    """Return the number of heads of a layer with rotary embeddings; 0 for other layers."""
    return {"self_attn.q_proj": generator.shape.heads, "self_attn.k_proj": generator.shape.kv_heads}.get(module, 0)
