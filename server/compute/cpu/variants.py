"""The kinds of processor that the C kernels are compiled for, and which of them this one can run."""

from dataclasses import dataclass

from bases import machine

AVX512 = ("avx512f", "avx512bw", "avx512vl")


@dataclass(frozen=True)
class Variant:
    """One compilation of the same sources."""

    name: str
    instructions: tuple[str, ...]
    """What a processor must have, as Linux names it."""
    flags: tuple[str, ...]
    """For gcc or clang."""
    slow_on: str | None = None
    """Vendor, as in ``/proc/cpuinfo``, on whose processors the next variant is faster."""

    def lacking(self) -> list[str]:
        """Instructions that this processor does not have."""
        has = machine.instructions()
        return [name for name in self.instructions if name not in has]


def _variant(name: str, *instructions: str, flags: tuple[str, ...] = (), slow_on: str | None = None) -> Variant:
    options = tuple(f"-m{instruction.replace('amx_', 'amx-').replace('_', '')}" for instruction in instructions)
    return Variant(name, instructions, (*options, *flags), slow_on)


AVX512BF16 = _variant("avx512bf16", *AVX512, "avx512_bf16", slow_on="GenuineIntel")
VARIANTS = (
    _variant("amx", *AVX512BF16.instructions, "amx_tile", "amx_bf16"),
    AVX512BF16,
    _variant("avx512", *AVX512),
    _variant("avx2", "avx2", "fma"),
    _variant("portable"),
)
"""The fastest first. The last one runs anywhere. All give the same bits."""
NAMES = tuple(variant.name for variant in VARIANTS)


def of_architecture(name: str) -> tuple[Variant, ...]:
    """Those that can be compiled for an architecture, named as by ``platform.machine()``."""
    return tuple(variant for variant in VARIANTS if name == "x86_64" or not variant.instructions)


EMULATED_AMX = _variant("emulated-amx", *AVX512BF16.instructions, flags=("-DEMULATED_AMX",))
"""AMX's kernels with tile instructions written in C: for tests on processors without them."""
