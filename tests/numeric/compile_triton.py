"""Compiles every Triton kernel to machine code, for GPUs that need not be there. Run as a program: prints their names.

A process of its own, because under the interpreter nothing is compiled.
"""

import itertools
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from server.compute.cuda import attention, lora, rows

POINTERS = {
    "tokens": (
        *("x", "a", "q", "k", "v", "keys", "values", *(f"{s}{i}" for s in "by" for i in range(3))),
        *("delta", "weight", "cosine", "sine", "q_norm", "k_norm", "gate", "up"),
    ),
    "*fp32": ("h", "weights", "peaks", "parts"),
    "*i32": ("tiles", "pages", "blocks"),
}
"""Type -> parameters. ``tokens``: what has the model's dtype."""
NUMBERS = {"scale": "fp32", "eps": "fp32"}
SHAPE = {"size": 16, "kv_heads": 8, "width": 128, "wide": 128}


def compile_kernel(kernel, dtype: str, capability: int, constants, **types: str) -> None:
    """For bf16 or fp16 and a GPU's compute capability; pointers aligned to 16 bytes, integers to nothing."""
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
    """All kernels at the shapes of an 8B Llama."""
    for (dtype, dot), capability in itertools.product((("bf16", tl.bfloat16), ("fp16", tl.float16)), (80, 90)):
        group = {"features": 4096, "members": 3, "splits": 2, "lanes": lora.LANES, "dot": dot}
        for kernel, width in (
            *((lora._shrink_rows, 512), (lora._shrink_tiles, 128)),
            *((lora._expand_rows, 256), (lora._expand_tiles, 128)),
        ):
            compile_kernel(kernel, dtype, capability, {**group, "width": width})
        compile_kernel(attention._write, dtype, capability, {**SHAPE, "height": 16})
        how = {**SHAPE, "group": 4, "window": 100, "softcap": 30.0, "dot": dot}
        chunk, single = {"height": 16, "columns": 64, "splits": 1}, {"height": 1, "columns": 16, "splits": 16}
        compile_kernel(attention._attend, dtype, capability, {**how, **chunk}, out="tokens")
        compile_kernel(attention._attend, dtype, capability, {**how, **single}, out="*fp32")
        compile_kernel(
            attention._combine, dtype, capability, {**SHAPE, "heads": 32, "splits": 16, "window": 0}, out="tokens"
        )
        norm = {"features": 4096, "wide": 4096, "add": True}
        compile_kernel(rows._norm, dtype, capability, norm, out="tokens")
        heads = {"heads": 32, "kv_heads": 8, "width": 128, "wide": 64, "normed": True}
        compile_kernel(rows._rotate, dtype, capability, heads)
        compile_kernel(rows._gate, dtype, capability, {"features": 14336, "width": rows.WIDTH}, out="tokens")


if __name__ == "__main__":
    sys.exit(main())
