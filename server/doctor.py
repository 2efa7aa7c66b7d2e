"""``manylora doctor``: what this machine can do, and what would go wrong, on one screen."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import torch
from rich.console import Console

from bases import machine
from bases.errors import BaseRejected, ConfigError
from bases.model_source import DEMO, find_source, on_hub
from bases.nf4 import functional
from bases.preflight import check_source
from server.compute.cpu import kernels as cpu_kernels
from server.config import Settings
from server.listener import bind

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "fastapi", "uvicorn")
_GIB = 2**30
_RUNTIME_BYTES = 3 * _GIB // 4
"""What Python, torch and the libraries take beside weights and caches, about."""


def examine(settings: Settings) -> list[str]:
    """Print the findings and return the problems, one line each."""
    # Plain lines: a table would fold or cut the paths, which are there to be copied.
    lines = [f"manylora {_version('manylora')}"]
    for name, finding in findings(settings):
        lines += [f"  {label:<13} {line}" for label, line in zip_longest([name], finding.splitlines(), fillvalue="")]
    wrong = problems(settings)
    lines += [f"would go wrong: {line}" for line in wrong]
    if not wrong:
        lines.append("nothing would go wrong that can be seen from here")
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return wrong


def findings(settings: Settings) -> list[tuple[str, str]]:
    """(what, how it is) for each row of the table."""
    memory = machine.memory()
    return [
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("device", _device()),
        ("processor", _processor()),
        ("cores", _cores(settings)),
        ("caches", ", ".join(machine.caches()) or "unknown"),
        ("memory", f"{memory.free / _GIB:.1f} GiB free of {memory.total / _GIB:.1f}{_limit(memory)}"),
        ("C compiler", shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "none"),
        ("kernels", _kernels()),
        ("libraries", ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)),
        ("demo model", _demo()),
        ("data", str(settings.data)),
        ("cached bases", "\n".join(_cached_bases(settings.data)) or "none yet"),
    ]


def problems(settings: Settings) -> list[str]:
    """What would stop ``manylora serve`` with these settings, or make it something else than it seems."""
    checks = (
        _model_problem,
        _device_problem,
        _port_problem,
        _data_problem,
        _memory_problem,
        _block_problem,
        _kernels_problem,
    )
    return [problem for check in checks if (problem := check(settings))]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu (torch sees no CUDA device)"
    properties = torch.cuda.get_device_properties(0)
    return f"cuda: {properties.name}, {properties.total_memory / _GIB:.0f} GiB"


def _cores(settings: Settings) -> str:
    share = machine.cpu_quota()
    quota = "" if share is None else f", a share of {share:g} in this container"
    return f"{machine.usable_cpus()} usable of {machine.total_cpus()}{quota}; the model gets {settings.cpu_threads}"


def _limit(memory: machine.Memory) -> str:
    return "" if memory.limit is None else f", in this container, by {memory.limit}"


def _processor() -> str:
    has = machine.instructions()
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    features = ", ".join(name if key in has else f"no {name}" for key, name in names.items())
    kernel = "fused" if functional.has_avx512bf16() else "plain (slower: no AVX512-BF16)"
    return f"{features}; 4-bit kernel on CPU: {kernel}"


def _kernels() -> str:
    kernels = cpu_kernels.load()
    if kernels is None:
        return f"bitsandbytes' and torch's ({cpu_kernels.absence()})"
    return "our own, on AMX: NF4 products, attention, LoRA; all of a Llama, Mistral, Qwen 2 or Qwen 3 in one call"


def _demo() -> str:
    try:
        return str(find_source(DEMO).path)
    except ConfigError as error:
        return str(error).removeprefix("--model: ")


def _cached_bases(data: Path) -> list[str]:
    folders = sorted(path.parent for path in data.glob("bases/*/config.json"))
    return [f"{folder.name}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.0f} MB" for folder in folders]


def _model_problem(settings: Settings) -> str | None:
    """What a start would say of a local model: nothing is downloaded here. The demo is as it was installed."""
    if on_hub(settings.model):
        return None
    try:
        source = find_source(settings.model)
        if settings.model != DEMO:
            check_source(source, settings.max_model_len)
    except (ConfigError, BaseRejected) as error:
        return str(error)
    return None


def _device_problem(settings: Settings) -> str | None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        return f"--device: torch {torch.__version__} sees no CUDA device"
    return None


def _port_problem(settings: Settings) -> str | None:
    try:
        bind(settings.host, settings.port).close()
    except ConfigError as error:
        return str(error)
    return None


def _data_problem(settings: Settings) -> str | None:
    nearest = next(path for path in (settings.data, *settings.data.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return f"--data: {settings.data} cannot be written"
    free = shutil.disk_usage(nearest).free
    return f"--data: only {free / _GIB:.1f} GiB of disk are free under {nearest}" if free < _GIB else None


def _memory_problem(settings: Settings) -> str | None:
    """Keys and values count where they were asked for: left to itself the server takes what is there."""
    needed = ((settings.kv_memory_gib or 0) + settings.host_cache_gib) * _GIB + _RUNTIME_BYTES
    free = machine.memory().free
    if needed <= free:
        return None
    return (
        f"memory: {needed / _GIB:.1f} GiB wanted beside the model's weights (--kv-memory-gib, --host-cache-gib and the "
        f"program itself), {free / _GIB:.1f} GiB free"
    )


def _block_problem(settings: Settings) -> str | None:
    if settings.device == "cuda" or settings.block_size % 16 == 0 or cpu_kernels.load() is None:
        return None
    return f"--block-size: {settings.block_size} is no multiple of 16, which the kernels for this CPU need: slower"


def _kernels_problem(_: Settings) -> str | None:
    if find_spec("kernels") is None:
        return None
    return "the package `kernels` is installed: libraries here fetch code with it at run time; pip uninstall kernels"
