"""Which errors say that there was not enough memory: they come from Python, numpy, torch, CUDA and mmap."""

import errno

import torch

_TORCH = ("you tried to allocate", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
"""In the message of a RuntimeError of torch: its CPU allocator's, CUDA's, cuBLAS's and those of the system."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that memory could not be allocated: with less to do, the same may succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _TORCH)
