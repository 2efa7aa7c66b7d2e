"""The errors of a training run, besides those of :mod:`bases.errors` and of the data.

::

    bases.errors.ManyloraError
    ├── bases.errors.ConfigError       an option is invalid
    ├── conversation.DataError         a row or file cannot be trained on
    └── TrainingError                  a run failed; its checkpoints are kept
        └── Diverged                   a loss or a gradient is not finite
"""

from bases.errors import ManyloraError
from training.data.conversation import DataError

__all__ = ["DataError", "Diverged", "TrainingError"]


class TrainingError(ManyloraError):
    """A run failed. No adapter was written; its checkpoints are kept."""


class Diverged(TrainingError):
    """A loss or a gradient is infinite or NaN."""
