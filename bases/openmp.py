"""How long OpenMP's threads spin while they wait for each other."""

import os

SERVING_SPINS = 1_000
"""How often a waiting thread spins, about 50 us, before it sleeps. By default libgomp spins for milliseconds, and when
another process takes one of the cores, parallel regions take 30 to 80 times as long instead of twice. Measured on two
cores with one busy process beside the server: a decode step of 7 ms took 17 ms with this, 570 ms without."""
TRAINING_SPINS = 20_000
"""About 1 ms. Longer than for serving, because a training step runs torch operators with Python between them. On a
quiet machine: 437 tokens/s; 376 with 5,000 spins, 297 with SERVING_SPINS, 411 with libgomp's default."""


def set_spin_count(spins: int = SERVING_SPINS) -> None:
    """Set ``GOMP_SPINCOUNT`` unless the user has set it or ``OMP_WAIT_POLICY``.

    Call it before torch is imported: libgomp reads the environment when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(spins))
