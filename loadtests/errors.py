"""What ends a benchmark before it has figures.

::

    bases.errors.ManyloraError
    └── BenchError
        ├── BadOption        an option, a trace or a record that cannot be used, or a server of another kind
        └── ServerUnusable   the server does not start, does not answer, or does not take the adapters
"""

from bases.errors import ManyloraError


class BenchError(ManyloraError):
    """The benchmark cannot be run."""


class BadOption(BenchError):
    """What was asked for makes no sense; no work was sent."""

    exit_status = 2


class ServerUnusable(BenchError):
    """What was asked for cannot be had from this server."""
