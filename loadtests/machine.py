"""The client's machine and version, as records of load tests keep them."""

import platform
from importlib.metadata import PackageNotFoundError, version

from bases import machine


def client_machine() -> dict[str, object]:
    """Return the operating system, the processor, the logical CPUs that this process may use, and Python's version."""
    return {
        "system": platform.platform(),
        "processor": machine.processor_name(),
        "cores": machine.usable_cpus(),
        "python": platform.python_version(),
    }


def client_version() -> str:
    """Return the version of the installed package ``manylora``; ``unknown`` if it is not installed."""
    try:
        return version("manylora")
    except PackageNotFoundError:
        return "unknown"
