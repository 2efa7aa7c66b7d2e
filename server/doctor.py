"""``manylora doctor``: what this machine can do, and the problems that ``manylora serve`` would have here."""

import os
import platform
import shlex
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
from bases.preflight import check_source
from server.access.key_file import VARIABLE, read_keys
from server.compute.cpu.build import PREBUILT, NoCompiler, find_compiler
from server.compute.cpu.selection import select_kernels
from server.config import Settings
from server.connections import connection_limits
from server.database import FILE
from server.listener import NO_KEYS, bind, is_local
from server.tls import load_certificate

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "fastapi", "uvicorn")
_GIB = 2**30
_RUNTIME_BYTES = 3 * _GIB // 4
"""About what Python, torch and the libraries need besides weights and caches."""


def examine(settings: Settings) -> list[str]:
    """Print the findings and return the problems, one line each."""
    # No table: it would wrap or truncate paths, which a user wants to copy.
    lines = [f"manylora {_version('manylora')}"]
    for name, finding in findings(settings):
        lines += [f"  {label:<13} {line}" for label, line in zip_longest([name], finding.splitlines(), fillvalue="")]
    found = problems(settings)
    lines += [f"problem: {line}" for line in found]
    if not found:
        lines.append("no problem found")
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return found


def findings(settings: Settings) -> list[tuple[str, str]]:
    """Return (name, finding) pairs: the machine, the libraries, and what is cached."""
    memory = machine.memory()
    return [
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("device", _device()),
        ("processor", _processor()),
        ("cores", _cores(settings)),
        ("caches", ", ".join(machine.caches()) or "unknown"),
        ("memory", f"{memory.free / _GIB:.1f} GiB free of {memory.total / _GIB:.1f}{_limit(memory)}"),
        ("C compiler", _compiler()),
        ("kernels", _kernels(settings)),
        ("libraries", ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)),
        ("demo model", _demo()),
        ("data", str(settings.data_dir)),
        ("cached bases", "\n".join(_cached_bases(settings.data_dir)) or "none yet"),
    ]


def problems(settings: Settings) -> list[str]:
    """Return what would stop ``manylora serve`` with these settings, or make it slow or unsafe, one line each."""
    checks = (
        _model_problem,
        _device_problem,
        _port_problem,
        _keys_problem,
        _connections_problem,
        _data_problem,
        _memory_problem,
        _cpu_problem,
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
    quota = "" if share is None else f", CPU quota {share:g} in this container"
    threads = settings.cpu_threads
    return f"{machine.usable_cpus()} usable of {machine.total_cpus()}{quota}; {threads} threads for the model"


def _limit(memory: machine.Memory) -> str:
    return "" if memory.limit is None else f", limited in this container by {memory.limit}"


def _processor() -> str:
    has = machine.instructions()
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
    return ", ".join(name if key in has else f"no {name}" for key, name in names.items())


def _compiler() -> str:
    try:
        return shlex.join(find_compiler())
    except NoCompiler:
        return "none"


def _kernels(settings: Settings) -> str:
    try:
        selection = select_kernels(settings.cpu)
    except ConfigError as error:
        return str(error)
    if selection.kernels is None:
        return str(selection)
    return f"{selection}; {'from the wheel' if selection.kernels.path.parent == PREBUILT else 'compiled here'}"


def _cpu_problem(settings: Settings) -> str | None:
    if settings.device == "cuda":
        return None
    try:
        selection = select_kernels(settings.cpu)
    except ConfigError as error:
        return str(error)
    if selection.kernels is None and settings.cpu == "auto":
        return f"kernels: {list(selection.reasons.values())[-1]}; torch's serve, which are many times slower"
    return None


def _demo() -> str:
    try:
        return str(find_source(DEMO).path)
    except ConfigError as error:
        return str(error).removeprefix("--model: ")


def _cached_bases(data: Path) -> list[str]:
    folders = sorted(path.parent for path in data.glob("bases/*/config.json"))
    return [f"{folder.name}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.0f} MB" for folder in folders]


def _model_problem(settings: Settings) -> str | None:
    """Return the error that ``manylora serve`` would give for a local model.

    A hub id is not checked, for nothing is downloaded here; nor are the demo's files, which pip has installed.
    """
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


def _keys_problem(settings: Settings) -> str | None:
    """Return the error of a server that has no keys, as far as that is known without opening its database."""
    try:
        read_keys(settings.api_key_file, os.environ)
        with bind(settings.host, 0) as listener:
            local = is_local(listener)
    except ConfigError as error:
        return None if str(error).startswith("--host") else str(error)  # that is reported with the port
    given = settings.allow_anonymous or settings.api_key_file is not None or VARIABLE in os.environ
    if local or given or settings.database_url is not None or (settings.data_dir / FILE).exists():
        return None
    return NO_KEYS.format(host=settings.host)


def _connections_problem(settings: Settings) -> str | None:
    try:
        connection_limits(settings, machine.most_open_files())
        load_certificate(settings)
    except ConfigError as error:
        return str(error)
    return None


def _data_problem(settings: Settings) -> str | None:
    nearest = next(path for path in (settings.data_dir, *settings.data_dir.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return f"--data-dir: {settings.data_dir} is not writable"
    free = shutil.disk_usage(nearest).free
    return f"--data-dir: only {free / _GIB:.1f} GiB of disk space are free under {nearest}" if free < _GIB else None


def _memory_problem(settings: Settings) -> str | None:
    """Count the KV cache only if its size is given: with ``auto`` the server takes what is free."""
    needed = ((settings.kv_memory_gib or 0) + settings.host_cache_gib) * _GIB + _RUNTIME_BYTES
    free = machine.memory().free
    if needed <= free:
        return None
    return (
        f"memory: {needed / _GIB:.1f} GiB are needed besides the model's weights (--kv-memory-gib, --host-cache-gib, "
        f"the program itself), but only {free / _GIB:.1f} GiB are free"
    )


def _block_problem(settings: Settings) -> str | None:
    if settings.device == "cuda" or settings.block_size % 16 == 0 or settings.cpu == "torch":
        return None
    return f"--block-size: {settings.block_size} is not a multiple of 16, so the faster kernels for this CPU go unused"


def _kernels_problem(_: Settings) -> str | None:
    if find_spec("kernels") is None:
        return None
    return (
        "the package `kernels` is installed: with it, transformers may download code at run time; pip uninstall kernels"
    )
