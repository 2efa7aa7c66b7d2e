"""Which of the compiled kernels serve on this machine, and why not better ones."""

import logging
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from bases import machine
from bases.errors import ConfigError
from server.compute.cpu.build import PREBUILT, NoCompiler, library
from server.compute.cpu.kernels import Kernels, NotPermittedError
from server.compute.cpu.variants import VARIANTS, Variant

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The kernels that serve, and the reasons against the others."""

    kernels: Kernels | None
    """None: torch's and bitsandbytes' serve."""
    reasons: Mapping[str, str]
    """Variant -> why it does not serve. The faster ones only, unless none serves."""

    def __str__(self) -> str:
        """One line."""
        name = self.kernels.variant.name if self.kernels else "torch's and bitsandbytes', which are many times slower"
        return "; ".join((name, *(f"not {variant}: {reason}" for variant, reason in self.reasons.items())))


@cache
def select_kernels(cpu: str = "auto") -> Selection:
    """Select the best variant that runs here (``auto``), one by its name, or none of our own (``torch``).

    On Intel's processors ``auto`` passes AVX512-BF16 over: its dot products take longer there than multiply-adds.
    They are compiled unless a wheel brought them or they were compiled here before. A variant that the compiler is too
    old for is passed over with a warning. ``auto`` selects none, after a warning, where nothing can be compiled.
    Raises ConfigError for a named variant that cannot run here, and RuntimeError for a library that does not fit
    :mod:`server.compute.cpu.structures`.
    """
    if cpu == "torch":
        return Selection(None, {})
    reasons: dict[str, str] = {}
    for variant in VARIANTS if cpu == "auto" else [variant for variant in VARIANTS if variant.name == cpu]:
        if cpu == "auto" and variant.slow_on == machine.vendor() and not variant.lacking():
            reasons[variant.name] = "slower on this vendor's processors than the next one"
            continue
        kernels = _try(variant, reasons)
        if kernels:
            selection = Selection(kernels, reasons)
            log.info("CPU kernels: %s", selection)
            return selection
    if cpu != "auto":
        raise ConfigError(f"--cpu {cpu}: {reasons[cpu]}")
    log.warning(
        "The C kernels cannot be used: %s. Those of torch and bitsandbytes take their place: they are many times "
        "slower, and with them an answer may depend on what shares its batch, by rounding",
        list(reasons.values())[-1],
    )
    return Selection(None, reasons)


def _try(variant: Variant, reasons: dict[str, str]) -> Kernels | None:
    """The kernels of ``variant``; None where they cannot be had, with the reason added to ``reasons``."""
    if missing := variant.lacking():
        reasons[variant.name] = f"this processor has no {', '.join(missing)}"
        return None
    try:
        return compiled(variant)
    except subprocess.CalledProcessError as error:
        reasons[variant.name] = f"the compiler failed: {(error.stderr or str(error)).strip()}"
        log.warning("The C kernels for %s cannot be compiled: %s", variant.name, reasons[variant.name])
    except (NoCompiler, OSError) as error:
        reasons[variant.name] = str(error)
    return None


def compiled(variant: Variant) -> Kernels:
    """The kernels of one variant. Raises as :func:`server.compute.cpu.build.library` and :class:`Kernels` do."""
    path = library(variant)
    try:
        return Kernels(variant, path)
    except NotPermittedError:
        raise
    except OSError:
        if path.parent == PREBUILT:  # not ours to delete
            raise
        path.unlink(missing_ok=True)  # damaged, by a crash while it was written
        return Kernels(variant, library(variant))
