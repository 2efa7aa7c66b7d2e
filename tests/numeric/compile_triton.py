"""Compiles every Triton kernel to machine code without a GPU, and prints their names. Run as a program.

In a process of its own, because the tests' process uses the interpreter, which compiles nothing.
"""

import itertools
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from server.compute.cuda import attention, fused_ops, lora

POINTERS = {
    "tokens": (
        *("x", "a", "q", "k", "v", "key_cache", "value_cache", *(f"{s}{i}" for s in "by" for i in range(3))),
        *("delta", "weight", "cosine", "sine", "q_norm", "k_norm", "gate", "up"),
    ),
    "*fp32": ("h", "weights", "stats", "partial"),
    "*i32": ("tiles", "pages", "blocks"),
}
"""Type -> names of parameters. ``tokens``: pointers to the model's dtype."""
NUMBERS = {"scale": "fp32", "eps": "fp32"}
SHAPE = {"size": 16, "kv_heads": 8, "head_dim": 128, "block_d": 128}


def compile_kernel(kernel, dtype: str, capability: int, constants, **types: str) -> None:
    """Compile ``kernel`` for bf16 or fp16 and a compute capability. Pointers are aligned to 16 bytes."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    named = {name: kind for kind, names in POINTERS.items() for name in names} | NUMBERS | types
    signature = {n: "constexpr" if n in constants else named.get(n, "i32") for n in kernel.arg_names}
    signature = {n: f"*{dtype}" if kind == "tokens" else kind for n, kind in signature.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    sys.stdout.write(f"{kernel.__name__}\n")


def main() -> None:
    """Compile all kernels at the shapes of an 8B Llama."""
    for (dtype, dot), capability in itertools.product((("bf16", tl.bfloat16), ("fp16", tl.float16)), (80, 90)):
        group = {"features": 4096, "members": 3, "splits": 2, "row_programs": lora.ROW_PROGRAMS, "dot": dot}
        for kernel, block in (
            *((lora._shrink_decode_kernel, {"block_in": 512}), (lora._shrink_prefill_kernel, {"block_in": 128})),
            *((lora._expand_decode_kernel, {"block_out": 256}), (lora._expand_prefill_kernel, {"block_out": 128})),
        ):
            compile_kernel(kernel, dtype, capability, group | block)
        compile_kernel(attention._write_kv_kernel, dtype, capability, {**SHAPE, "block_rows": 16})
        constants = {**SHAPE, "group": 4, "window": 100, "softcap": 30.0, "dot": dot}
        prefill = {"tile_rows": 16, "block_queries": 64, "splits": 1}
        decode = {"tile_rows": 1, "block_queries": 16, "splits": 16}
        compile_kernel(attention._attention_kernel, dtype, capability, constants | prefill, out="tokens")
        compile_kernel(attention._attention_kernel, dtype, capability, constants | decode, out="*fp32")
        splits = {**SHAPE, "heads": 32, "splits": 16, "window": 0}
        compile_kernel(attention._combine_splits_kernel, dtype, capability, splits, out="tokens")
        norm = {"features": 4096, "block": 4096, "add": True}
        compile_kernel(fused_ops._rms_norm_kernel, dtype, capability, norm, out="tokens")
        heads = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_half": 64, "normed": True}
        compile_kernel(fused_ops._rotary_kernel, dtype, capability, heads)
        gate = {"features": 14336, "block": fused_ops.BLOCK_FEATURES}
        compile_kernel(fused_ops._silu_and_mul_kernel, dtype, capability, gate, out="tokens")


if __name__ == "__main__":
    sys.exit(main())
