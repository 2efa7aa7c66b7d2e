"""How OpenMP's threads wait for each other."""

import os

SERVING = 1_000
"""Rounds of a waiting thread, about 50 us, before it lets go of its core. Left to itself libgomp spins for
milliseconds, and a team that has lost one core to another process then takes 30 to 80 times as long instead of twice:
measured on two cores with one busy process beside the server, a decode step of 7 ms took 17 ms with this, 570
without."""
TRAINING = 20_000
"""The same, about 1 ms: a step of training goes through torch, with Python between its products. On a quiet machine 437
tokens/s, where 5,000 rounds gave 376, SERVING 297, and libgomp's own 411."""


def wait_briefly(spins: int = SERVING) -> None:
    """Call before torch is imported: libgomp reads the environment when it is loaded. What the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(spins))
