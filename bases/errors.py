"""The root of every error that a user can cause, in any package.

::

    ManyloraError
    ├── ConfigError                     an option that cannot work
    ├── BaseRejected                    a base model that cannot be served correctly
    ├── adapters.errors.AdapterError    anything wrong with an adapter
    ├── adapters.cli.client.RemoteError a running server refused a request, or did not answer
    ├── server.errors.ServerError       a request that cannot be served, or a failed step
    ├── training.errors.TrainingError   a training run that ended early; DataError for its data
    └── loadtests.errors.BenchError     a benchmark that cannot be run

``manylora.main`` alone prints them and turns them into an exit status. This module imports nothing, so that every
package may import it.
"""

from typing import ClassVar


class ManyloraError(Exception):
    """An error with a message for the user who caused it."""

    exit_status: ClassVar[int] = 1
    """Exit status of the process: 1 for a failure, 2 for an option, a name or data that cannot be used."""

    def terminal_lines(self) -> list[str]:
        """Return the lines to print on stderr, without the program's name in front."""
        return str(self).splitlines()


class ConfigError(ManyloraError):
    """An option that cannot work."""

    exit_status = 2


class BaseRejected(ManyloraError):
    """A base model that cannot be served correctly, with the reason."""


def one_line(text: str) -> str:
    """Return ``text`` with a space for each line break or control character, which could steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
