"""The C kernels as Python calls them."""

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from server.compute.backend import RowScores
from server.compute.cpu.batches import LoraRows, PagedChunks
from server.compute.cpu.structures import (
    ATTENTION_SCRATCH,
    NF4_BLOCK,
    NF4_BORDER,
    NF4_SCRATCH,
    TILE_INPUTS,
    TILE_ROWS,
    Attention,
    Lora,
    Model,
    Nf4,
    Step,
    Workspace,
    address,
    check_layout,
)
from server.compute.cpu.variants import Variant
from server.engine.slots import PAGE

Addresses = NDArray[np.int64]


class NotPermittedError(OSError):
    """The processor has what a variant needs, and this process may not use it."""


class Kernels:
    """The compiled library of one variant."""

    def __init__(self, variant: Variant, path: Path) -> None:
        """Raises OSError where Linux does not let this process use what the variant needs."""
        lib = ctypes.CDLL(str(path))
        check_layout(lib)
        lib.nf4_matmul.argtypes = [c_void_p, c_int64, *[c_void_p] * 3, c_int]
        lib.lora_rows.argtypes = [*[c_void_p] * 2, c_int, c_int64, *[c_void_p] * 4, c_int]
        lib.write_pieces.argtypes = [c_int64, *[c_void_p] * 3, c_int]
        lib.attend.argtypes = [c_void_p, c_int64, *[c_void_p] * 2, c_int64, c_int]
        lib.bind_threads.argtypes = [c_void_p, c_int]
        lib.decode_step.argtypes = [*[c_void_p] * 3, c_int]
        lib.row_peaks.argtypes = [c_int64, c_int64, *[c_void_p] * 3, c_int]
        lib.draw_rows.argtypes = [c_int64, c_int64, *[c_void_p] * 4, c_int]
        lib.top_rows.argtypes = [c_int64, c_int64, *[c_void_p] * 2, c_int64, *[c_void_p] * 3, c_int]
        lib.score_rows.argtypes = [c_int64, c_int64, *[c_void_p] * 2, c_int64, *[c_void_p] * 5, c_int]
        kernels = (lib.nf4_matmul, lib.lora_rows, lib.write_pieces, lib.attend, lib.decode_step)
        for function in (*kernels, lib.row_peaks, lib.draw_rows, lib.top_rows, lib.score_rows):
            function.restype = None
        if lib.kernels_init():
            raise NotPermittedError("Linux does not let this process use the tile registers")
        self.variant = variant
        self.path = path
        self._lib = lib

    def nf4_matmul(self, x: Tensor, layer: Nf4) -> Tensor:
        """Multiply x [rows, in] bf16 by the layer's weights and add its bias -> [rows, out] bf16."""
        x = x.contiguous()  # kept in a name: a pointer alone does not keep a copy alive
        rows = x.shape[0]
        if not rows:
            return torch.empty(0, layer.out, dtype=torch.bfloat16)
        if x.shape[1] != layer.stride:
            copy = padded_input(rows, x.shape[1], layer.stride)
            copy[:rows, : x.shape[1]] = x
            x = copy
        elif rows % TILE_ROWS:
            x = F.pad(x, (0, 0, 0, pad_rows(rows) - rows))
        out = torch.empty(rows, layer.out, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        scratch = torch.empty(threads * layer.blocks * NF4_BLOCK * NF4_SCRATCH)
        self._lib.nf4_matmul(byref(layer), rows, x.data_ptr(), out.data_ptr(), scratch.data_ptr(), threads)
        return out

    def lora_rows(
        self, x: Tensor, lora: Lora, rows: LoraRows, active: Sequence[int], outputs: Sequence[Tensor]
    ) -> None:
        """Add to the ``active`` members' ``outputs`` [rows, out] bf16 what adapters make of ``x`` [rows, in] bf16."""
        members = len(outputs)
        x = F.pad(x, (0, -x.shape[1] % TILE_INPUTS)).contiguous()
        h = torch.empty(rows.pages * members * TILE_ROWS * PAGE, dtype=torch.bfloat16)
        self._lib.lora_rows(
            *(byref(lora), rows.address, sum(1 << member for member in active), x.shape[1], x.data_ptr()),
            (c_void_p * members)(*(y.data_ptr() for y in outputs)),
            (c_int64 * members)(*(y.stride(0) for y in outputs)),
            *(h.data_ptr(), torch.get_num_threads()),
        )

    def write_pieces(self, to: Addresses, sources: Addresses, counts: Addresses) -> None:
        """Copy ``counts`` bytes each from ``sources`` (0: write zeros) ``to`` elsewhere; all [pieces] int64."""
        to, sources, counts = (np.ascontiguousarray(array, np.int64) for array in (to, sources, counts))
        addresses = (array.ctypes.data for array in (to, sources, counts))
        self._lib.write_pieces(len(to), *addresses, torch.get_num_threads())

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        chunks: PagedChunks,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Causal attention of q [T, H, D] over keys and values [blocks, size, KVH, D] -> [T, H, D], all bf16.

        Keys and values lie in memory as [blocks, KVH, size, D].
        window: positions a query sees, itself included, None for all; softcap as in AttentionParams.
        """
        _, heads, width = q.shape
        _, size, kv_heads, _ = keys.shape
        assert keys.transpose(1, 2).is_contiguous()
        assert values.transpose(1, 2).is_contiguous()
        q = q.contiguous()
        out = torch.empty_like(q)
        threads = torch.get_num_threads()
        scratch = torch.empty(threads * chunks.context * ATTENTION_SCRATCH)
        job = Attention(
            *(heads, kv_heads, width, size, window or 0, scale, softcap or 0.0),
            *(tensor.data_ptr() for tensor in (q, keys, values, chunks.blocks, out)),
        )
        table = (len(chunks.table), chunks.table.data_ptr())
        self._lib.attend(byref(job), *table, scratch.data_ptr(), chunks.context, threads)
        return out

    def bind_threads(self, cpus: Sequence[int]) -> bool:
        """Bind this thread and its OpenMP team to one of ``cpus`` each; whether all are bound."""
        array = (c_int32 * len(cpus))(*cpus)
        failed: int = self._lib.bind_threads(array, len(cpus))
        return not failed

    def decode_step(self, model: Model, step: Step, work: Workspace, threads: int) -> None:
        """All layers of a model, embeddings to logits, as the decoder asks for. ``work`` has room for ``threads``."""
        self._lib.decode_step(byref(model), byref(step), byref(work), threads)

    def row_peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits [rows, vocabulary] float32: each row's largest, NaN if it has one, and the first token that has it.

        torch's ``max`` over a dimension keeps an index for every comparison, and takes ten times as long.
        """
        assert logits.is_contiguous()
        peaks, tokens = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
        outputs = (logits.data_ptr(), peaks.data_ptr(), tokens.data_ptr())
        self._lib.row_peaks(*logits.shape, *outputs, torch.get_num_threads())
        return peaks, tokens

    def draw_rows(self, logits: Tensor, temperatures: Tensor, u: Tensor) -> Tensor:
        """As :meth:`server.compute.backend.SamplingOps.draw_rows`, in two readings of each row."""
        assert logits.is_contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        inputs = (logits.data_ptr(), temperatures.data_ptr(), u.data_ptr())
        self._lib.draw_rows(*logits.shape, *inputs, tokens.data_ptr(), torch.get_num_threads())
        return tokens

    def top_rows(self, logits: Tensor, temperatures: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """As :meth:`server.compute.backend.SamplingOps.top_rows`; of equally likely tokens the earlier come first."""
        assert logits.is_contiguous()
        rows, vocabulary = logits.shape
        threads = torch.get_num_threads()
        probs, tokens = torch.empty(rows, width), torch.empty(rows, width, dtype=torch.int64)
        scratch = torch.empty(threads, vocabulary, dtype=torch.int64)
        outputs = (probs.data_ptr(), tokens.data_ptr(), scratch.data_ptr())
        self._lib.top_rows(rows, vocabulary, logits.data_ptr(), temperatures.data_ptr(), width, *outputs, threads)
        return probs, tokens

    def score_rows(self, logits: Tensor, tokens: Tensor, width: int) -> RowScores:
        """As :meth:`server.compute.backend.SamplingOps.score_rows`."""
        assert logits.is_contiguous()
        rows, vocabulary = logits.shape
        threads = torch.get_num_threads()
        logprobs, ranks = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        top, likely = torch.empty(rows, width), torch.empty(rows, width, dtype=torch.int64)
        scratch = torch.empty(threads, vocabulary, dtype=torch.int64)
        outputs = (address(tensor) for tensor in (logprobs, ranks, top, likely, scratch))
        self._lib.score_rows(rows, vocabulary, address(logits), address(tokens), width, *outputs, threads)
        return RowScores(logprobs, ranks, top, likely)


def pad_rows(rows: int) -> int:
    """Up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def padded_input(rows: int, inputs: int, stride: int) -> Tensor:
    """Room [rows in whole tiles, stride] bf16 for an NF4 layer's input; zeros all around it, if it is padded at all."""
    padded = pad_rows(rows)
    if stride == inputs:
        return torch.empty(padded, stride, dtype=torch.bfloat16)
    return torch.zeros(NF4_BORDER + padded * stride, dtype=torch.bfloat16)[NF4_BORDER:].view(padded, stride)
