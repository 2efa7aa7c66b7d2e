"""How OpenMP's threads wait for each other."""

import os

SPINS = "1000"
"""Rounds of a waiting thread, about 50 us, before it lets go of its core. Left to itself libgomp spins for
milliseconds, and a team that has lost one core to another process then takes 30 to 80 times as long instead of twice:
measured on two cores with one busy process beside the server, a decode step of 7 ms took 17 ms with this, 570
without."""


def wait_briefly() -> None:
    """Call before torch is imported: libgomp reads the environment when it is loaded. What the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
