"""What is raised on purpose, whoever raises it.

::

    ManyloraError
    ├── ConfigError      an option that cannot work; printed as one line, exit status 2
    ├── BaseRejected     a base model that cannot be served correctly
    └── ...              server.errors.ServerError and training's own
"""


class ManyloraError(Exception):
    """Anything raised on purpose, with a message fit for whoever caused it."""


class ConfigError(ManyloraError):
    """An option that cannot work."""


class BaseRejected(ManyloraError):
    """A base model that cannot be served correctly, with the reason."""
