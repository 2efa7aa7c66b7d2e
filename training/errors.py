"""What is raised on purpose by a training run, beside what :mod:`bases.errors` and the data have.

::

    bases.errors.ManyloraError
    ├── bases.errors.ConfigError       an option that cannot work
    ├── conversation.DataError         data that cannot be trained on, with the row
    └── TrainingError                  a run that ended before its end; what it has saved is kept
        └── Diverged                   a loss or a gradient that is no finite number
"""

from bases.errors import ManyloraError
from training.data.conversation import DataError

__all__ = ["DataError", "Diverged", "TrainingError"]


class TrainingError(ManyloraError):
    """A run that ended before its end. No adapter was written; its checkpoints are kept."""


class Diverged(TrainingError):
    """The loss, or the gradients, stopped being finite numbers."""
