"""Optional dependencies: which command needs which packages, and the error if they are missing."""

from importlib.util import find_spec

from bases.errors import ManyloraError

EXTRAS = {
    "chat": ("prompt_toolkit",),
    "train": ("matplotlib", "peft", "pyarrow", "tensorboard"),
    "bench": ("aiohttp", "matplotlib"),
    "ray": ("ray",),
}
"""Extra of the manylora package -> modules that it installs and that its command imports."""


class MissingExtra(ManyloraError):
    """Packages that a command needs are not installed."""


def require(extra: str, command: str) -> None:
    """Raise MissingExtra, with the command that installs them, unless all modules of ``extra`` can be imported."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{command} needs packages that are not installed ({', '.join(missing)}); install them with: "
            f'pip install "manylora[{extra}]"'
        )
