"""C kernels for CPUs, compiled by the machine's own compiler when the server first needs them.

They are optional: each has a plain path beside it (bitsandbytes' kernel, torch) that serves where the processor or a
compiler is missing, and a numeric test between the two. Called through ctypes, which lets go of the interpreter lock.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
FLAGS = (
    *("-O3", "-shared", "-fPIC", "-fopenmp"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
)
TILE_ROWS = 16
KEY_STEP = 32


class Kernels:
    """The compiled library. This processor runs ``nf4_matmul`` and ``attend`` if ``amx``, ``lora_rows`` if ``lora``."""

    def __init__(self, library: Path) -> None:
        lib = ctypes.CDLL(str(library))
        lib.nf4_matmul.argtypes = [c_int64] * 3 + [c_void_p] * 5 + [c_int]
        lib.nf4_matmul.restype = None
        lib.lora_rows.argtypes = [c_int64] * 3 + [c_void_p] * 2 + [c_int64] + [c_void_p] * 8 + [c_int]
        lib.lora_rows.restype = None
        lib.attend.argtypes = [
            *(c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_void_p),
            *(c_int64, c_float, c_float, c_void_p, c_void_p, c_int64, c_int),
        ]
        lib.attend.restype = None
        self._lib = lib
        self.amx: bool = lib.amx_init() == 0
        self.lora: bool = lib.lora_init() == 0

    def nf4_matmul(self, x: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
        """Multiply x [rows, in] bf16 by NF4 weights [out, in / 2] with scales [in / 64, out] bf16 -> [rows, out] bf16.

        Weights and scales are in bitsandbytes' CPU layout (:class:`server.linear.FusedNf4`).
        """
        x = x.contiguous()  # kept in a name: a pointer alone does not keep a copy alive
        rows, features = x.shape
        padded = -(-rows // TILE_ROWS) * TILE_ROWS
        if padded != rows:
            x = torch.nn.functional.pad(x, (0, 0, 0, padded - rows))
        out = torch.empty(rows, weight.shape[0], dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        scratch = torch.empty(threads * padded * 32)
        self._lib.nf4_matmul(rows, weight.shape[0], features, *_pointers([x, weight, absmax, out, scratch]), threads)
        return out

    def lora_rows(
        self, x: Tensor, a: Tensor, bs: Sequence[Tensor | None], outputs: Sequence[Tensor], uses: "Uses"
    ) -> None:
        """Add to each of ``outputs`` [rows, out] bf16 what its rows' adapters make of ``x`` [rows, in] bf16.

        ``a`` [pages, members, PAGE, in] and ``bs`` [pages, PAGE, out] as in :class:`server.lora.LoraGroup`.
        """
        members = len(bs)
        x = x.contiguous()
        h = torch.empty(uses.count * members * a.shape[2])
        self._lib.lora_rows(
            x.shape[0],
            x.shape[1],
            members,
            x.data_ptr(),
            *(uses.table.data_ptr(), uses.count, uses.order.data_ptr(), uses.row_start.data_ptr()),
            a.data_ptr(),
            (c_void_p * members)(*(None if b is None else b.data_ptr() for b in bs)),
            (c_void_p * members)(*(y.data_ptr() for y in outputs)),
            (c_int64 * members)(*(y.shape[1] for y in outputs)),
            (c_int64 * members)(*(y.stride(0) for y in outputs)),
            h.data_ptr(),
            torch.get_num_threads(),
        )

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        runs: "PagedRuns",
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Causal attention of q [T, H, D] over keys and values [blocks, size, KVH, D] -> [T, H, D], all bf16.

        window: positions a query sees, itself included, None for all; softcap as in :class:`server.attention.How`.
        """
        _, heads, width = q.shape
        _, size, kv_heads, _ = keys.shape
        q = q.contiguous()
        out = torch.empty_like(q)
        threads = torch.get_num_threads()
        scratch = torch.empty(threads * runs.context * 24)
        self._lib.attend(
            *(len(runs.table), runs.table.data_ptr(), heads, kv_heads, width, size),
            *_pointers([q, keys, values, runs.blocks]),
            *(window or 0, scale, softcap or 0.0, out.data_ptr(), scratch.data_ptr(), runs.context, threads),
        )
        return out


class PagedRuns:
    """Rows that follow each other in one sequence, run by run, in the layout of ``attention.c``."""

    def __init__(self, runs: Sequence[tuple[int, int, int, Sequence[int]]], size: int) -> None:
        """``runs`` are (first row of the batch, rows, position of the first, blocks); blocks hold ``size`` tokens."""
        starts = list(accumulate((len(blocks) for *_, blocks in runs), initial=0))
        self.table = torch.tensor([(*run, at) for (*run, _), at in zip(runs, starts, strict=False)])
        self.blocks = torch.tensor([block for *_, blocks in runs for block in blocks])
        longest = max(len(blocks) for *_, blocks in runs) * size
        self.context = -(-longest // KEY_STEP) * KEY_STEP


class Uses:
    """Which row takes which page with which weight, in the layout of ``lora.c``."""

    def __init__(self, rows: int, uses: Sequence[tuple[int, int, float]]) -> None:
        """``uses`` are (page, row, weight), row by row; within a row they are summed in the order given.

        That order must not come from where adapters happen to sit: float addition is not associative.
        """
        self.count = len(uses)
        pages = torch.tensor([page for page, _, _ in uses], dtype=torch.int32)
        by_page = pages.argsort(stable=True)
        rows_used = torch.tensor([row for _, row, _ in uses], dtype=torch.int32)
        weights = torch.tensor([weight for _, _, weight in uses], dtype=torch.float32).view(torch.int32)
        self.table = torch.stack([pages, rows_used, weights], dim=1)[by_page]
        self.order = by_page.argsort().to(torch.int32)
        counts = torch.bincount(rows_used.long(), minlength=rows)
        self.row_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@cache
def load() -> Kernels | None:
    """The kernels, compiled if this source was not compiled here before; None, said in the log, where that fails."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        log.warning("No C compiler: the kernels of bitsandbytes and torch are used, which are slower on CPUs with AMX.")
        return None
    try:
        library = _library(compiler)
        try:
            return Kernels(library)
        except OSError:  # damaged, by a crash while it was written
            library.unlink()
            return Kernels(_library(compiler))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("The C kernels could not be built, those of bitsandbytes and torch are used: %s", detail)
        return None


def _library(compiler: list[str]) -> Path:
    """The compiled library, built unless it is here."""
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = [version.encode(), *(source.read_bytes() for source in SOURCES), *(flag.encode() for flag in FLAGS)]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manylora"
    library = folder / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / library.name
            command = [*compiler, *FLAGS, "-o", str(made), *map(str, SOURCES), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            with made.open("rb") as written:
                os.fsync(written.fileno())
            made.rename(library)
    return library
