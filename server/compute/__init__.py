"""Compute backends, one folder each: the reference in plain torch, C kernels for CPUs, Triton kernels for CUDA.

:mod:`server.compute.backend` is the protocol that they implement. The code above does not ask which one runs.
"""

import logging
from types import ModuleType

import torch

from server.compute import cpu, cuda, reference
from server.compute.backend import Backend

log = logging.getLogger(__name__)

BACKENDS: tuple[ModuleType, ...] = (cuda, cpu, reference)
"""The folders, fastest first. Each has two functions: ``unsupported_reason(device)`` says why it cannot compute on
``device``, or None where it can; ``make(device, dtype, cpu)`` returns its :class:`~server.compute.backend.Backend`. The
last can compute anywhere."""


def choose_backend(device: torch.device, dtype: torch.dtype, cpu: str = "auto") -> Backend:
    """The first of BACKENDS that can compute on ``device``, for activations, keys and values of ``dtype``.

    ``cpu`` names the kernels on CPUs, see :attr:`server.config.Settings.cpu`. Raises ConfigError where this machine
    cannot run them.
    """
    for module in BACKENDS:
        reason = module.unsupported_reason(device)
        if reason is None:
            backend: Backend = module.make(device, dtype, cpu)
            return backend
        log.debug("%s does not compute on %s: %s", module.__name__, device, reason)
    raise AssertionError("the reference computes anywhere")
