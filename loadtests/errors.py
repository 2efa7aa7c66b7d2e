"""Errors that end a benchmark before it has results.

::

    bases.errors.ManyloraError
    └── BenchError
        ├── BadOption        an invalid option, trace or record, or a server of another kind than --peer
        └── ServerUnusable   the server does not start, does not answer, or refuses the adapters
"""

from bases.errors import ManyloraError


class BenchError(ManyloraError):
    """The benchmark cannot be run."""


class BadOption(BenchError):
    """An option, trace or record is invalid. No workload was sent."""

    exit_status = 2


class ServerUnusable(BenchError):
    """The server cannot be measured with these options."""
